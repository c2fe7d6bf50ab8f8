"""How many tokens a second vLLM serves over HTTP, a dense model beside the same one pruned.

    python -m benchmarks.serving pruned
    python -m benchmarks.serving pruned --dense ./my-model --concurrency 1 --rounds 1

In the environment that `make test-vllm` makes, with vLLM's own benchmark client. Both servers run all the time, on
all cores; the client asks one and then the other, several rounds of both at each number of concurrent requests. Figures
are medians over rounds of tokens written a second; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from urllib.error import URLError
from urllib.request import urlopen

from armorfact_hf.data.load_model import DEMO
from armorfact_hf.report.record import Report

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
CLIENT = """
import sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args(sys.argv[1:]))
"""
STARTING = 900  # seconds that a server may take to start


def dense_folder(pruned: Path) -> str:
    """The dense model that a folder was pruned from, as its report remembers it."""
    name = Report.read(pruned).model.name
    if not name.startswith(DEMO):
        return name
    from armorfact_hf.data.demo_models import fetch_model

    return str(fetch_model(name.removeprefix(DEMO), print))


@contextmanager
def served(model: str, dtype: str, length: int, eager: bool) -> Iterator[str]:
    """The address of a server of the model, for requests of so many tokens, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", dtype]
    command += ["--port", str(port), "--max-model-len", str(length), "--no-enable-prefix-caching"]
    command += ["--enforce-eager"] * eager
    with tempfile.TemporaryFile("w+") as log:
        started = subprocess.Popen(
            command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            try:
                _wait(f"http://127.0.0.1:{port}", started)
            except TimeoutError as error:
                log.seek(0)
                raise RuntimeError(f"the server of {model} did not start:\n{log.read()[-4000:]}") from error
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(started.pid, signal.SIGTERM)
            started.wait()


def _wait(address: str, server: subprocess.Popen) -> None:
    """Until the server answers.

    Raises:
        TimeoutError: it ended, or takes too long.
    """
    for _ in range(STARTING):
        try:
            urlopen(f"{address}/health", timeout=5).close()
            return
        except (URLError, TimeoutError, ConnectionError):
            time.sleep(1)
        if server.poll() is not None:
            break
    raise TimeoutError(address)


def throughput(address: str, model: str, requests: int, prompt: int, new: int) -> float:
    """Tokens written a second with so many requests at a time, of random tokens."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--random-input-len", str(prompt), "--random-output-len", str(new), "--random-range-ratio", "0"]
        amount = ["--num-prompts", str(2 * requests), "--max-concurrency", str(requests), "--num-warmups", "1"]
        to = ["--backend", "openai", "--base-url", address, "--model", model, "--dataset-name", "random"]
        output = ["--disable-tqdm", "--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        command = [sys.executable, "-c", CLIENT, *to, *sizes, *amount, *output, "--temperature", "0"]
        asked = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
        if asked.returncode:
            raise RuntimeError(f"vLLM's benchmark client failed:\n{asked.stderr[-4000:]}")
        found = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    if found["completed"] != 2 * requests:
        raise RuntimeError(f"{found['completed']} of {2 * requests} requests were answered: {found.get('errors')}")
    return found["output_throughput"]


def main() -> None:
    """Print a line for each number of concurrent requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", help="a folder that `armorfact prune` wrote")
    parser.add_argument("--dense", help="the dense model's folder; the report's if not given")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens written after it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the models")
    arguments = parser.parse_args()
    models = {"dense": arguments.dense or dense_folder(Path(arguments.pruned)), "pruned": arguments.pruned}
    print("| requests at a time | dense, tokens/s | pruned, tokens/s | pruned / dense |\n|---|---|---|---|")
    with ExitStack() as stack:
        serve = {
            name: stack.enter_context(
                served(model, arguments.dtype, 2 * (arguments.prompt + arguments.new), not arguments.compile)
            )
            for name, model in models.items()
        }
        for requests in arguments.concurrency:
            rounds: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(arguments.rounds):
                for name, model in models.items():
                    rounds[name].append(throughput(serve[name], model, requests, arguments.prompt, arguments.new))
            dense, pruned = (median(rounds[name]) for name in ("dense", "pruned"))
            print(f"| {requests} | {dense:.1f} | {pruned:.1f} | {pruned / dense:.2f} |", flush=True)


if __name__ == "__main__":
    main()
