"""PyTorch's elastic agent (rendezvous, restarts) around our own processes: when it ends them, and what it says then."""

import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable

import torch.distributed as dist
import torch.distributed.elastic.rendezvous.registry as rendezvous
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters

from megatron_patch.train.interface import GLOO, interface_towards
from megatron_patch.train.nodes import Nodes
from megatron_patch.train.ranks import Ranks
from megatron_patch.train.report import Verdict, first_words, unanswered, verdict

MEETING_SECONDS = 900  # torchrun's own limit for the agents to meet
MONITOR_SECONDS = 0.1
LAST_WORDS_SECONDS = 5.0  # from the first failure until the others are ended


def run(options: Namespace, ranks: Ranks, say: Callable[[str], None]) -> int:
    """Meet the other agents, start the ranks, see them through. Returns the exit status."""
    static = {"rank": options.node_rank} if options.rdzv_backend == "static" else {}
    endpoint = options.rdzv_endpoint or f"{options.master_addr}:{options.master_port}"
    if options.nnodes > 1 and static and (interface := interface_towards(options.master_addr)):
        os.environ.setdefault(GLOO, interface)
    parameters = RendezvousParameters(
        backend=options.rdzv_backend,
        endpoint=endpoint,
        run_id=options.rdzv_id,
        min_nodes=options.nnodes,
        max_nodes=options.nnodes,
        local_addr=options.local_addr,
        timeout=MEETING_SECONDS,
        **static,
    )
    try:
        handler = rendezvous.get_rendezvous_handler(parameters)
        spec = WorkerSpec(
            role="ranks",
            local_world_size=options.nproc_per_node,
            rdzv_handler=handler,
            entrypoint=sys.executable,
            args=("-u", "-m", options.module, *options.arguments),
            max_restarts=options.max_restarts,
            monitor_interval=MONITOR_SECONDS,
            master_addr=options.master_addr if static else None,
            master_port=options.master_port if static else None,
            local_addr=options.local_addr,
        )
        result = Agent(spec, ranks, say).run()
        handler.shutdown()
    except (RendezvousError, dist.DistError, OSError) as error:
        say(f"nobody could meet at {endpoint}: {first_words(error)}")
        return 1
    return int(result.is_failed())


class Agent(SimpleElasticAgent):
    """What torch leaves to an agent: how the workers of a node start, are watched, and end."""

    def __init__(self, spec: WorkerSpec, ranks: Ranks, say: Callable[[str], None]) -> None:
        super().__init__(spec)
        self.ranks, self.say = ranks, say
        self.nodes: Nodes | None = None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        spec = worker_group.spec
        shared = {
            "GROUP_RANK": worker_group.group_rank,
            "GROUP_WORLD_SIZE": worker_group.group_world_size,
            "LOCAL_WORLD_SIZE": spec.local_world_size,
            "MASTER_ADDR": worker_group.master_addr,
            "MASTER_PORT": worker_group.master_port,
            "TORCHELASTIC_RESTART_COUNT": spec.max_restarts - self._remaining_restarts,
            "TORCHELASTIC_MAX_RESTARTS": spec.max_restarts,
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": spec.rdzv_handler.use_agent_store,
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.getenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }
        environments = {}
        for worker in worker_group.workers:
            own = {"RANK": worker.global_rank, "LOCAL_RANK": worker.local_rank, "WORLD_SIZE": worker.world_size}
            environments[worker.global_rank] = {name: str(value) for name, value in (shared | own).items()}
        numbers = (worker_group.group_rank, worker_group.group_world_size)
        common = dist.PrefixStore(f"start_{self._remaining_restarts}", self._store)
        self.nodes = Nodes(common, *numbers, list(environments))
        self.ranks.start([spec.entrypoint, *spec.args], environments)
        return {worker.local_rank: self.ranks.processes[worker.global_rank].pid for worker in worker_group.workers}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        statuses = self.ranks.statuses()
        if not any(statuses.values()):
            done = None not in statuses.values()
            state = WorkerState.SUCCEEDED if done else WorkerState.HEALTHY
            if not done and (fault := self.nodes.fault()):
                self._follow(fault)
                return RunResult(WorkerState.FAILED, failures=self._failures(worker_group))
            return RunResult(state, return_values=dict.fromkeys(statuses) if done else {})
        if self.ranks.is_stopping and -signal.SIGTERM in statuses.values():
            self.ranks.end()
            self.say("stopped; no rank was training, so there was nothing to save")
            raise SystemExit(0)
        self._blame()
        return RunResult(WorkerState.FAILED, failures=self._failures(worker_group))

    def _stop_workers(self, worker_group: WorkerGroup, is_restart: bool = False) -> None:
        self.ranks.end()
        if self.nodes:
            self.nodes.close()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self.ranks.end()

    def _blame(self) -> None:
        """End all ranks, having heard those that end by themselves, and say why."""
        silent = self.ranks.places(self.ranks.settle(LAST_WORDS_SECONDS))
        found = verdict(self.ranks.endings(), silent)
        self.ranks.end()
        if found.is_vague and (fault := self.nodes.fault(LAST_WORDS_SECONDS)):
            self._follow(fault)
            return
        if found.traceback:
            print(found.traceback, file=sys.stderr)
        self.say("; ".join([*(self.nodes.missing() if found.is_vague else []), found.sentence]))
        self.nodes.tell(found, LAST_WORDS_SECONDS)

    def _follow(self, fault: Verdict) -> None:
        """End all ranks because of what happened elsewhere; if it is that a rank did not answer, it may be one here."""
        silent = self.ranks.places(self.ranks.settle(0)) if fault.is_vague else {}
        self.ranks.end()
        self.say("; ".join(filter(None, [unanswered(silent), f"on another node: {fault.sentence}"])))
        if self._worker_group.group_rank == 0:
            time.sleep(5 * MONITOR_SECONDS)  # we have the store, and the agent that told asks it who heard

    def _failures(self, worker_group: WorkerGroup) -> dict[int, ProcessFailure]:
        statuses = self.ranks.statuses()
        return {
            worker.global_rank: ProcessFailure(worker.local_rank, worker.id, statuses[worker.global_rank], "")
            for worker in worker_group.workers
        }
