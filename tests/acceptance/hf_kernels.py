"""Hugging Face's package `kernels`, installed for real into a folder of its own: transformers still runs beside ours without it, and
`longdraft doctor` refuses it by name. Prints one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

TRANSFORMERS_RUNS = """
import kernels, torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
assert LlamaForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)
print(kernels.__version__)
"""


def main() -> int:
    ours = subprocess.run([sys.executable, "-c", TRANSFORMERS_RUNS], capture_output=True, text=True, check=False)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)  # as root the embedded PostgreSQL runs as another user, who must be able to walk in
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, "kernels"]
        subprocess.run(install, check=True, stdout=sys.stderr)
        # After our own folder on the path: both distributions are there, ours is the one that is imported.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), folder]), "LONGDRAFT_DATA_DIR": f"{folder}/data"}
        doctor = subprocess.run(
            [sys.executable, "-m", "service.cli.main", "doctor", "--json"], env=environment, capture_output=True, text=True, check=False
        )
    finding = next((entry for entry in json.loads(doctor.stdout or "[]") if entry["check"] == "kernels"), {})
    good = ours.returncode == 0 and finding.get("status") == "failed" and doctor.returncode == 1
    print(json.dumps({"beside_ours": ours.stdout.strip() or ours.stderr[-300:], "doctor": finding, "pass": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
