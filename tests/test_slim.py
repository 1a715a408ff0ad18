"""What docker/gateway/slim.sh leaves of the AWS client is all that S3 needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.conftest import S3Access

ROOT = Path(__file__).parents[1]
# Every call that the storage makes by boto3, by a python that sees the slimmed packages first.
PROGRAM = """
import asyncio, io, sys
import botocore
from gateway.settings import Settings
from gateway.storage import Storage

async def use():
    storage = Storage(Settings())
    await storage.ensure_bucket()
    await storage.check()
    await storage.put_stream("whole", io.BytesIO(b"w" * 100), "text/plain")
    # More than one part.
    await storage.put_stream("parts", io.BytesIO(b"p" * (20 << 20)), "application/octet-stream")
    await storage.copy("whole", "copied")
    assert await storage.get("copied") == b"w" * 100
    assert [await storage.size_bytes(key) for key in ("whole", "parts", "absent")] == [100, 20 << 20, None]
    assert "X-Amz-Signature=" in storage.sign("whole") and "X-Amz-Signature=" in storage.sign_put("put", {})
    await storage.delete(["whole", "parts", "copied"])
    assert await storage.size_bytes("whole") is None
    storage.close()

asyncio.run(use())
print(botocore.__file__)
"""


def test_s3_works_with_what_is_left(s3: S3Access, tmp_path: Path) -> None:
    packages = tmp_path / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    for name in ("boto3", "botocore", "s3transfer"):
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        shutil.copytree(Path(spec.origin).parent, packages / name)
    subprocess.run(["sh", str(ROOT / "docker" / "gateway" / "slim.sh"), str(tmp_path)], check=True, timeout=60)
    left = sorted(path.name for path in (packages / "botocore" / "data").iterdir() if path.is_dir())
    assert left == ["s3", "sso", "sso-oidc", "sts"]
    env = {
        **os.environ,
        "PYTHONPATH": f"{packages}:{ROOT}",
        "S3_ENDPOINT_URL": s3.endpoint_url,
        "AWS_ACCESS_KEY_ID": s3.access_key_id,
        "AWS_SECRET_ACCESS_KEY": s3.secret_access_key,
        "S3_BUCKET": s3.bucket,
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(packages / "botocore" / "__init__.py")
