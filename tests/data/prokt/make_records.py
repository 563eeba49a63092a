"""Take what the default tests need from the full records of the original's runs."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np


HERE = Path(__file__).parent
# Whose weights in the end are kept.
WITH_WEIGHTS = ("lam0_k1", "lam0.4_k1_torchadamw", "lam0.4_k2", "lam0.4_k1_wd_warmup_clip", "bilstm_pair_lam0.3")
IN_SINGLE = ("lam0.4_k1_torchadamw", "lam0.4_k1_nozero_torchadamw", "lam0.4_k2", "bilstm_pair_lam0.3")
KEPT = ("batch", "t_loss", "s_loss", "t_ce", "t_kld", "gn_t", "gn_s", "lr_t", "lr_s", "s_target", "t_target", "eval")


def main(source: Path) -> None:
    for name in ("teacher_init", "student_init"):
        shutil.copytree(source / name, HERE / name, dirs_exist_ok=True)
    shutil.copy(source / "bilstm" / "init.safetensors", HERE / "bilstm_init.safetensors")
    runs = json.loads((source / "runs_fp32.json").read_text()) | json.loads((source / "runs_fp64.json").read_text())
    (HERE / "runs").mkdir(exist_ok=True)
    found = []
    for file in sorted([*source.glob("runs/*.npz"), *source.glob("bilstm/bilstm_*.npz")]):
        run, _, dtype = file.stem.rpartition("_")
        if dtype == "fp32" and run not in IN_SINGLE:
            continue
        archive = dict(np.load(file))
        kept = {name: value for name, value in archive.items() if name.split("/")[0] in KEPT}
        if run in WITH_WEIGHTS and dtype == "fp64":
            kept |= {name: v.astype(np.float32) for name, v in archive.items() if name.startswith("final/")}
        for name, value in kept.items():
            if value.dtype == np.int64:
                kept[name] = value.astype(np.uint8)
        np.savez_compressed(HERE / "runs" / (run if dtype == "fp64" else file.stem), **kept)
        found.append(run)
    (HERE / "runs.json").write_text(json.dumps({name: runs[name] for name in sorted({*found})}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
