"""Two processes choose the same zeros, as many as asked for. That they resume exactly: `test_distributed.py`."""

import torch

from tests import distributed_program as program


def test_two_processes_choose_the_same_blocks(tmp_path, pair):
    first, second = pair.run(program.train, "compression", str(tmp_path), program.rows(20), apart=True)
    masks = {name: value for name, value in first["weights"].items() if name.endswith(" pruned")}
    assert len(masks) == 12
    assert all(torch.equal(mask, second["weights"][name]) for name, mask in masks.items())
    blocks = torch.cat([mask.view(len(mask) // 4, 4, -1).all(1).flatten() for mask in masks.values()])
    assert int(blocks.sum()) == int(len(blocks) * 0.5)
    for name, mask in masks.items():
        assert not first["weights"][name.removesuffix(" pruned")][mask].any()
