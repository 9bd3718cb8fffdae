"""An sbatch script: Ray on the nodes that Slurm gives, one run on it, and all of it gone with the job."""

from __future__ import annotations

import shlex
from pathlib import Path

from cluster.manifests.settings import Settings
from training.spec import Scaling

_SCRIPT = r"""#!/bin/bash
#SBATCH --job-name={run_id}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={cpus}
{gpu_line}#SBATCH --mem={memory}
#SBATCH --time={hours}:00:00
{partition_line}#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={run_id}-%j.log
# SIGTERM comes 120 s before the time is up: the job is put back into the queue and goes on from its checkpoint.
#SBATCH --signal=B:TERM@120
set -euo pipefail

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_AUTH_TOKEN=${{RAY_AUTH_TOKEN:-$(python -c 'import secrets; print(secrets.token_hex(32))')}}

nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${{nodes[0]}}
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | awk '{{print $1}}')
port=$((20000 + SLURM_JOB_ID % 20000))

driver=
again() {{
  echo "time is nearly up, or the node is wanted: a checkpoint, then back into the queue"
  if [ -n "$driver" ] && kill -TERM "$driver"; then
    for _ in $(seq 100); do kill -0 "$driver" 2>/dev/null || break; sleep 1; done
  fi
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}}
trap again TERM

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
  ray start --head --node-ip-address="$head_ip" --port="$port" --include-dashboard=false {ray_resources} --block &
sleep 15
for node in "${{nodes[@]:1}}"; do
  srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap \
    ray start --address="$head_ip:$port" {ray_resources} --block &
done

python - "$head_ip:$port" {nodes} <<'PY'
import sys, time
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
deadline = time.monotonic() + 300
while (alive := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[2]):
    if time.monotonic() > deadline:
        sys.exit(f"{{alive}} of {{sys.argv[2]}} nodes joined Ray within five minutes")
    time.sleep(2)
PY

run={quoted_id}
workspace={workspace}
spec={spec}
if [ -f {begun} ]; then
  set -- {go_on}
else
  set -- {begin}
fi
python -m cluster --workspace "$workspace" "$@" --address "$head_ip:$port" &
driver=$!
wait "$driver" || status=$?
exit "${{status:-0}}"
"""

_BEGUN = {
    "train": '"$workspace/runs/$run/spec.json"',
    "sequence": '"$workspace/sequences/$run/sequence.json"',
    "sweep": '"$workspace/sweeps/$run/sweep.json"',
}
_GO_ON = {"train": 'resume "$run"', "sequence": 'resume "$run"', "sweep": 'sweep --resume "$run"'}


def sbatch(command: str, spec: Path, run_id: str, scaling: Scaling, settings: Settings) -> str:
    """The script. Under one run id it begins the run, or goes on with it, however often Slurm starts it.

    Spec and data lie where all nodes see them, and so does the environment in which `ray` and `python` are found.
    """
    cpus, gpus = settings.per_node(scaling)
    return _SCRIPT.format(
        run_id=run_id,
        quoted_id=shlex.quote(run_id),
        nodes=settings.nodes(scaling),
        cpus=cpus,
        gpu_line=f"#SBATCH --gpus-per-node={gpus}\n" if gpus else "",
        partition_line=f"#SBATCH --partition={settings.partition}\n" if settings.partition else "",
        memory=settings.memory.removesuffix("i"),
        hours=settings.hours,
        ray_resources=f"--num-cpus={cpus} --num-gpus={gpus}",
        workspace=shlex.quote(settings.workspace),
        spec=shlex.quote(str(spec.resolve())),
        begun=_BEGUN[command],
        go_on=_GO_ON[command],
        begin='sweep "$spec"' if command == "sweep" else f'{command} "$spec" --id "$run"',
    )
