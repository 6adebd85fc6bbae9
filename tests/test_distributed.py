"""Two processes, one model: gains, weights and metrics agree between ranks and with one process on the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import copy, hashlib, json, os, sys
from pathlib import Path
import numpy as np, torch
from transformers import TrainingArguments
from fewbits import Rule, prepare, surrogates
from fewbits.data import TokenBlocks
from fewbits.testing.tiny import tiny_llama, toy_text
from fewbits.training import QATSettings, QATTrainer

torch.set_num_threads(1)
out, batch = Path(sys.argv[1]), int(sys.argv[2])
model = tiny_llama()
teacher = copy.deepcopy(model)
prepare(model, Rule(scheme="W2A16G32", surrogate=surrogates.JacQuant(mode="probe", interval=2, beta=0.5)))
data = np.frombuffer(toy_text(40).encode(), dtype=np.uint8)
blocks = TokenBlocks(data[: len(data) // 16 * 16].reshape(-1, 16).astype(np.int32), 1.0)
args = TrainingArguments(output_dir=str(out), max_steps=4, per_device_train_batch_size=batch, learning_rate=1e-3,
    save_strategy="no", logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False)
trainer = QATTrainer(model, args, teacher=teacher, settings=QATSettings(telemetry_interval=2), train_dataset=blocks)
trainer.train()
state = {k: v.detach().double().sum().item() for k, v in model.state_dict().items()}
digest = hashlib.sha256(b"".join(v.detach().numpy().tobytes() for v in model.state_dict().values())).hexdigest()
rank = os.environ.get("RANK", "0")
(out / f"rank{rank}.json").write_text(json.dumps({"digest": digest, "state": state}))
"""


def launch(folder: Path, processes: int, batch: int) -> list[dict[str, object]]:
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(script), str(folder), str(batch)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(processes)]


@pytest.mark.slow
def test_ranks_agree_and_equal_one_process(tmp_path: Path) -> None:
    first, second = launch(tmp_path / "two", 2, 2)
    assert first["digest"] == second["digest"]
    (single,) = launch(tmp_path / "one", 1, 4)
    a, b = first["state"], single["state"]
    assert isinstance(a, dict)
    assert isinstance(b, dict)
    for key, value in a.items():
        assert value == pytest.approx(b[key], rel=1e-3, abs=1e-3), key
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]
    assert steps == [1, 2, 3, 4]  # one writer, not two
