"""DDP becomes freeze-aware whatever the import order; subclasses do not. Each case is an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

ONE_RANK = """
import os, torch.distributed as dist
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
"""
INSTALL = "import kgtrun.drop_in; kgtrun.drop_in.install(os.getcwd())\n"
CHECK = """
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
class Mine(DDP): pass
stock, mine = DDP(torch.nn.Linear(2, 2), bucket_cap_mb=1), Mine(torch.nn.Linear(2, 2))
import kgt_ddp.ddp
assert type(stock) is kgt_ddp.ddp.FreezeAwareDDP and isinstance(stock, DDP)
assert type(mine) is Mine
assert list(stock.state_dict()) == ["module.weight", "module.bias"]
assert stock.module.weight.shape == (2, 2)
direct = kgt_ddp.ddp.FreezeAwareDDP(torch.nn.Linear(2, 2))
assert type(direct) is kgt_ddp.ddp.FreezeAwareDDP
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "code",
    [
        "import os\n" + INSTALL + ONE_RANK + CHECK,
        "import os, torch\n" + INSTALL + ONE_RANK + CHECK,
        "import os\n" + INSTALL + "import kgt_ddp.ddp\n" + ONE_RANK + CHECK,
        "import os\nfrom torch.nn.parallel import DistributedDataParallel\n" + INSTALL * 2 + ONE_RANK + CHECK,
    ],
    ids=["before torch", "after torch", "with our class first", "after DDP, twice"],
)
def test_import_orders(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_boot_step_and_the_drop_in_do_not_import_torch(tmp_path):
    script = tmp_path / "s.py"
    script.write_text("import sys; assert not {'torch', 'numpy', 'kgt_ddp'} & set(sys.modules)\n")
    import kgtrun.plan

    done = subprocess.run([sys.executable, kgtrun.plan.BOOT, "script", str(script)], timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr
