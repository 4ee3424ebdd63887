"""Two nodes on one machine: network namespaces joined by a cable where they may be made, else two loopback addresses.

PYTHONPATH=. python tests/launchers/two_nodes.py prints what both nodes of a run say, side by side: of one that ends
well, and of one whose second node is cut off.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from commands import MISTRAL, ROOT, clean_environment

PATIENCE, WIDTH = 180.0, 76
TIMEOUT_MINUTES = 0.15
ADDRESSES = ("10.77.0.1", "10.77.0.2")
# The second namespace belongs to the first one's user, so that a cable may lead into it.
JOIN = f"""
unshare -n sh -c 'echo $$; exec sleep 1000' & second=$!
sleep 0.1
ip link set lo up && ip link add near type veth peer name far netns $second &&
ip addr add {ADDRESSES[0]}/24 dev near && ip link set near up &&
nsenter -t $second -n sh -c 'ip link set lo up; ip addr add {ADDRESSES[1]}/24 dev far; ip link set far up' && echo $$ &&
cat
kill $second
"""


class Node(NamedTuple):
    """How a command gets to a node, and the address of the node."""

    prefix: list[str]
    address: str


class Nodes(NamedTuple):
    """Two nodes, what they are, and what cuts the second off, given its command."""

    pair: list[Node]
    kind: str
    cut: Callable[[subprocess.Popen], None]


class Command(NamedTuple):
    """One node's command, and the file that has its output."""

    process: subprocess.Popen
    output: Path

    def says(self, pattern: str) -> None:
        """Wait until it has said so."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, text := self.output.read_text(), re.MULTILINE):
            is_waiting = self.process.poll() is None and time.monotonic() < deadline
            assert is_waiting, f"never said {pattern!r}: {text}"
            time.sleep(0.02)


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """The nodes that this machine permits."""
    command = ["unshare", "-Urn", "sh", "-c", JOIN]
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        command = ["sh", "-c", "exit 1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as holder:  # the namespaces end with its standard input
        second, first = holder.stdout.readline().strip(), holder.stdout.readline().strip()
        if not first:
            yield Nodes([Node([], f"127.0.0.{n}") for n in (2, 3)], "two loopback addresses", stop)
            return
        pair = [
            Node(["nsenter", "--preserve-credentials", "-U", "-n", "-t", pid], address)
            for pid, address in zip((first, second), ADDRESSES, strict=True)
        ]
        unplug = [*pair[0].prefix, "ip", "link", "set", "near", "down"]
        yield Nodes(pair, "two network namespaces", lambda _: subprocess.run(unplug, check=True))


def stop(command: subprocess.Popen) -> None:
    """Stop a process and all that it started."""
    stats = {int(path.name): path.joinpath("stat").read_text() for path in Path("/proc").glob("[0-9]*")}
    parents = {pid: int(stat.rsplit(")", 1)[1].split()[1]) for pid, stat in stats.items()}
    tree = {command.pid}
    for _ in range(3):
        tree |= {pid for pid, parent in parents.items() if parent in tree}
    for pid in tree:
        os.kill(pid, signal.SIGSTOP)


def start(nodes: Nodes, folder: Path, name: str, arguments: list[str]) -> list[Command]:
    """The Mistral launcher on both nodes, one rank on each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = ({"NPROC_PER_NODE": "1"}, {"KUBERNETES_CONTAINER_RESOURCE_GPU": "1"})
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": nodes.pair[0].address, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    commands = []
    for number, node in enumerate(nodes.pair):
        variables = shared | ranks[number] | {"RANK": str(number)}
        output = folder / f"{name}_{number}.txt"
        with output.open("w") as file:
            process = subprocess.Popen(
                [*node.prefix, "sh", str(MISTRAL), *arguments],
                env=clean_environment(PYTHONPATH=str(ROOT), **variables),
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,
            )
        commands.append(Command(process, output))
    return commands


def side_by_side(nodes: Nodes, commands: list[Command]) -> str:
    """What both nodes said, without plans, paths and figures of speed."""
    columns = [[f"node {number}, {nodes.kind}", *_said(command)] for number, command in enumerate(commands)]
    return "\n".join(f"{left:{WIDTH}} │ {right}".rstrip() for left, right in zip_longest(*columns, fillvalue=""))


def _said(command: Command) -> list[str]:
    lines = command.output.read_text().splitlines()
    begin = next((number for number, line in enumerate(lines) if line == "command"), -2) + 2
    said = []
    for line in lines[begin:]:
        if not line.startswith("[W"):  # torch's own warnings
            short = re.sub(r" \| (elapsed|throughput).*(?= \| lm loss:)|/\S+/|\| loss scale.*", "", line)
            said += textwrap.wrap(short.strip(), WIDTH, subsequent_indent="  ")
    return [*said, f"exit status {command.process.poll()}"]


def main() -> None:
    """Both runs, one after the other."""
    from test_signals import training

    with tempfile.TemporaryDirectory() as temporary, two_nodes() as nodes:
        folder = Path(temporary)
        arguments = ["dlc", *training(folder)[1:]]
        short = start(nodes, folder, "short", [*arguments, "--train-iters", "3"])
        for command in short:
            command.process.wait(PATIENCE)
        print(side_by_side(nodes, short), end="\n\n")
        timeout = ["--distributed-timeout-minutes", str(TIMEOUT_MINUTES), "--log-interval", "1000000"]
        endless = start(nodes, folder, "endless", [*arguments, *timeout, "--save", str(folder / "endless")])
        endless[0].says(r"validation loss at iteration 0")
        nodes.cut(endless[1].process)
        endless[0].process.wait(PATIENCE)
        time.sleep(2.0)  # the other notices by itself
        print(side_by_side(nodes, endless))
        for command in endless:
            command.process.kill()


if __name__ == "__main__":
    main()
