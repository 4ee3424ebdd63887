"""`python3 -m megatron_patch.evaluate --model_args checkpoint=DIR,tp=2 --tasks …`: lm-eval's own command line, in which
this project's checkpoints and local tasks are known. Under `torchrun`, on several ranks.
"""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

TASKS = Path(__file__).parents[2] / "toolkits/evaluation/tasks"
LOCAL = ("mmlu_local", "ceval-valid_local", "cmmlu_local")


def main(argv: Sequence[str]) -> int:
    """lm-eval's exit status; 2, after one sentence, for what the user can mend."""
    arguments = list(argv)
    if not _given(arguments, "--model", "-M"):
        arguments += ["--model", "megatron_patch"]
    if not _given(arguments, "--include_path") and TASKS.is_dir():
        arguments += ["--include_path", str(TASKS)]
    if int(os.environ.get("RANK", "0")):
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  the first rank tells the results, until the process ends
    _avoid_an_unreachable_hub()
    try:
        return _run(arguments)
    except ConnectionError as error:
        print(f"evaluate: {error}; the tasks {', '.join(LOCAL)} read files under MP_EVAL_DATA instead", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
    return 2


def _given(arguments: Sequence[str], *names: str) -> bool:
    return any(argument.split("=")[0] in names for argument in arguments)


def _avoid_an_unreachable_hub() -> None:
    """Where the hub's name leads nowhere, ask only what is cached: its client tries again for half a minute."""
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _run(arguments: list[str]) -> int:
    from lm_eval.__main__ import cli_evaluate

    import megatron_patch.evaluate.lm  # noqa: F401  registers the model

    sys.argv = ["megatron_patch.evaluate", *arguments]
    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
