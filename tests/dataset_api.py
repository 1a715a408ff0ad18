"""A caller of `/v1/datasets`, and what lies in S3 behind its back."""

from __future__ import annotations

from typing import Any

import httpx

from tests.journeys.api import strip_signatures

DATASETS = "/v1/datasets"
MAX_UPLOAD_BYTES = 4 << 20

Files = list[tuple[str, bytes]]
Json = dict[str, Any]


def read_error(answer: httpx.Response, status: int, code: str) -> Json:
    """The error of an answer, after a look at its shape."""
    assert answer.status_code == status, answer.text
    error = dict(answer.json()["error"])
    assert error.keys() == {"code", "message", "hint", "details"}
    assert error["code"] == code, error
    return error


class Datasets:
    """One caller. `create`, `put` and `get` answer the dataset, with URLs that are the same at every read."""

    def __init__(self, http: httpx.Client, s3: Any, bucket: str) -> None:
        self.http, self._s3, self._bucket = http, s3, bucket

    def post(self, files: Files, **fields: str) -> httpx.Response:
        return self.http.post(DATASETS, files=[("files", file) for file in files] or None, data=fields)

    def create(self, files: Files, **fields: str) -> Json:
        answer = self.post(files, **fields)
        assert answer.status_code == 201, answer.text
        assert answer.headers["location"] == answer.json()["urls"]["self"]
        return dict(answer.json())

    def put(self, dataset_id: str, files: Files, **fields: str) -> Json:
        # A form without files is multipart all the same.
        parts: Any = [("files", file) for file in files] + [(name, (None, value)) for name, value in fields.items()]
        answer = self.http.put(f"{DATASETS}/{dataset_id}/files", files=parts)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def get(self, dataset_id: str, **query: Any) -> Json:
        answer = self.http.get(f"{DATASETS}/{dataset_id}", params=query)
        assert answer.status_code == 200, answer.text
        return self.strip(answer.json())

    @staticmethod
    def strip(dataset: Json) -> Json:
        files = [strip_signatures(file) if file["url"] else file for file in dataset["files"]]
        return {**dataset, "files": files}

    def keys(self, dataset_id: str) -> list[str]:
        """What lies in S3 under this dataset."""
        found = self._s3.list_objects_v2(Bucket=self._bucket, Prefix=f"datasets/{dataset_id}/")
        return sorted(item["Key"] for item in found.get("Contents", []))

    def all_keys(self) -> set[str]:
        found = self._s3.list_objects_v2(Bucket=self._bucket, Prefix="datasets/")
        return {item["Key"] for item in found.get("Contents", [])}
