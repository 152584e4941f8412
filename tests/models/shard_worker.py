"""One of two ranks that hold half of a model each; prints what it saw as JSON. Started by test_sharding.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from stepkd.models.policy import Policy
from stepkd.models.sharding import is_sharded, shard, share_of, whole_tensor
from stepkd.models.spec import PolicyConfig


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    before = anonymous()
    policy = Policy.load(PolicyConfig(path=folder, dtype=None))
    seen: dict[str, object] = {"rank": rank, "bytes": sum(p.numel() * p.element_size() for p in policy.parameters())}
    seen["loaded"] = anonymous() - before
    originals = {name: p.detach().clone() for name, p in list(policy.named_parameters())[:3]}
    ids = torch.arange(3, 11).unsqueeze(0)
    with torch.no_grad():
        expected = policy.head(policy.hidden(ids, torch.ones_like(ids)))
    mesh = init_device_mesh("cpu", (2,))
    shard(policy, mesh)
    seen["sharded"] = anonymous() - before
    seen["parts"] = all(is_sharded(p) for p in policy.parameters())
    parameters = dict(policy.named_parameters())
    seen["whole"] = all(torch.equal(whole_tensor(parameters[n].detach()), value) for n, value in originals.items())
    seen["share"] = all(
        torch.equal(share_of(value, parameters[n]).to_local(), parameters[n].to_local())  # type: ignore[attr-defined]
        for n, value in originals.items()
    )
    for _ in range(2):
        with torch.no_grad(), policy.gathered(), policy.gathered():
            for _ in range(3 * (1 - rank)):  # rank 1 does nothing at all, and rank 0 does not wait for it
                found = policy.head(policy.hidden(ids, torch.ones_like(ids)))
                seen["gap"] = float((found - expected).abs().max())
        seen["again"] = all(is_sharded(p) for p in policy.parameters())
    mixed = Policy.load(PolicyConfig(path="tiny-0.1m", dtype="float32"))
    shard(mixed, mesh, param_dtype=torch.bfloat16)
    with mixed.gathered():
        seen["gathered"] = sorted({str(p.dtype) for p in mixed.parameters()})
    seen["kept"] = sorted({str(p.dtype) for p in mixed.parameters()})
    sys.stdout.write(json.dumps(seen) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
