"""Requests to S3 through s3fs: each with time-outs, standard retries and an overall deadline; each error is one line.

Credentials and the endpoint come from the environment, the profile or the role (AWS_ENDPOINT_URL, AWS_PROFILE, ...): nothing
here takes, keeps, logs or pickles a secret.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tasks.disk import StoreError
from tasks.manifest import one_line

logger = logging.getLogger(__name__)

BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
PREFIX = re.compile(r"[A-Za-z0-9!_.*'()+=@~-]+(?:/[A-Za-z0-9!_.*'()+=@~-]+)*")
PART = 16 * 2**20
"""Bytes of a part of a large upload; what is smaller than two of them is sent at once."""
PARTS_AT_ONCE = 2
FILES_AT_ONCE = 4
MOST_PARTS = 9_000
"""S3 takes 10,000."""
PAGE = 1000
"""Names in one listing, and in one deletion: S3's most."""

CONFLICTS = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
MISSING = {"NoSuchKey", "NoSuchUpload", "NoSuchVersion", "404"}
NOT_OURS = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403"}
WORN_OUT = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed", "RequestExpired"}
ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301", "400"}
PASSING = {"SlowDown", "RequestTimeout", "OperationAborted", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}


@dataclass(frozen=True)
class Limits:
    """How long is waited; seconds."""

    connect: float = 10
    read: float = 30
    """Without a byte."""
    attempts: int = 4
    """Of one request, with growing pauses between them: botocore's standard retries."""
    deadline: float = 150
    """For one call with all its attempts, the time for its bytes apart."""
    slowest: float = 500_000
    """Bytes a second; a transfer that is slower is given up."""
    patience: float = 900
    """Once S3 has answered this process, an outage is waited out: it must not cost the result of a long run."""


LIMITS = Limits()


class Taken(Exception):
    """A conditional write found that another one was there first, or is there now."""


class Missing(Exception):
    """No such object, or no such upload. Not a FileNotFoundError, which would be a file of this machine."""


class Unreachable(StoreError):
    """No answer, or none that can be used. A write may have been applied nevertheless."""


class Cut(Unreachable):
    """The answer began, and broke off."""


class Garbled(Unreachable):
    """The answer came whole, but is not what the server's own checksum says: hurt on its way, or where it is kept."""


@dataclass(frozen=True)
class Listed:
    bytes: int
    modified: datetime


class Bucket:
    """The objects of one bucket below a prefix; names are relative to the prefix."""

    def __init__(self, uri: str):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        prefix = prefix.strip("/")
        odd = any(part in {".", ".."} for part in prefix.split("/"))
        if not BUCKET.fullmatch(bucket) or odd or (prefix and not PREFIX.fullmatch(prefix)):
            # what stands there may be a secret that somebody put into the address, so it is not repeated
            raise ValueError(
                "the s3:// store's address is not s3://bucket/prefix with a plain bucket name and prefix: mend it; credentials "
                "and the endpoint do not belong there, they come from AWS_PROFILE, AWS_ENDPOINT_URL and the like"
            )
        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._answered = False

    def __repr__(self) -> str:
        return f"Bucket({self.uri!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Bucket, (self.uri,)  # never the connection: it knows the secret

    def address(self, name: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{name}"

    # -- reading

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Content and ETag of a small object; None where there is none."""

        async def whole() -> tuple[bytes, str]:
            answer = await connection()._call_s3("get_object", Bucket=self.bucket, Key=self.prefix + name)
            try:
                return await answer["Body"].read(), answer["ETag"]
            finally:
                answer["Body"].close()

        try:
            found: tuple[bytes, str] = self._ask(f"reading {self.address(name)}", whole)
        except Missing:
            return None
        return found

    def download(self, name: str, to: Path, size: int) -> None:
        """The whole object in one GET, never in ranges; after a cut it goes on from there. Missing where it is."""
        fs = connection()
        self._ask(
            f"reading {self.address(name)}",
            lambda: fs._get_file(f"{self.bucket}/{self.prefix}{name}", str(to), max_concurrency=1),
            size,
        )

    def list(self, below: str) -> dict[str, Listed]:
        """Every object whose name begins with `below`."""
        found = {}
        for page in self._pages(below):
            for entry in page.get("Contents", ()):
                found[entry["Key"].removeprefix(self.prefix)] = Listed(entry["Size"], entry["LastModified"])
        return found

    def children(self, folder: str) -> Sequence[str]:
        """Names of the folders right below a folder, which ends with / or is empty."""
        pages = self._pages(folder, Delimiter="/")
        whole = self.prefix + folder
        return sorted(entry["Prefix"][len(whole) : -1] for page in pages for entry in page.get("CommonPrefixes", ()))

    def time(self) -> datetime:
        """The server's clock, by which `Listed.modified` was set; this machine's if the server tells none."""
        answer = self._call("list_objects_v2", "listing", MaxKeys=1, Prefix=self.prefix)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(date) if date else datetime.now(UTC)

    def uploads(self, below: str) -> Sequence[tuple[str, str, datetime]]:
        """Multipart uploads that were begun and not ended: name, id, when."""
        found: list[tuple[str, str, datetime]] = []
        more: dict[str, str] = {}
        while True:
            page = self._call("list_multipart_uploads", "listing uploads", Prefix=self.prefix + below, **more)
            entries = [entry for entry in page.get("Uploads", ()) if entry["Key"].startswith(self.prefix + below)]
            found += [(entry["Key"].removeprefix(self.prefix), entry["UploadId"], entry["Initiated"]) for entry in entries]
            if not page.get("IsTruncated"):
                return found
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    # -- writing

    def put(self, name: str, content: bytes, replaces: str | None) -> None:
        """One small object, if its present ETag is `replaces` (None: if there is none); else Taken."""
        condition = {"IfMatch": replaces} if replaces else {"IfNoneMatch": "*"}
        try:
            self._call("put_object", "writing", Key=self.prefix + name, Body=content, **condition)
        except Missing as error:  # the one to replace is gone
            raise Taken(name) from error

    def upload(self, path: Path, name: str) -> None:
        """A file under a name that nobody else uses: writing it twice is harmless. A failed multipart upload is aborted."""
        fs, size = connection(), path.stat().st_size
        part = max(PART, -(-size // MOST_PARTS))
        where = f"{self.bucket}/{self.prefix}{name}"

        def work() -> Any:
            return fs._put_file(str(path), where, chunksize=part, max_concurrency=PARTS_AT_ONCE)

        for last in (False, False, True):
            try:
                self._ask(f"writing {self.address(name)}", work, size)
                return
            except Missing as error:  # a multipart upload whose last reply was lost is unknown when it is ended again
                if last:
                    raise Unreachable(f"store {self.uri}: writing {self.address(name)}: it was not there in the end") from error

    def delete(self, names: Iterable[str]) -> None:
        keys = [{"Key": self.prefix + name} for name in names]
        for start in range(0, len(keys), PAGE):
            self._call("delete_objects", "deleting", Delete={"Objects": keys[start : start + PAGE], "Quiet": True})

    def abort(self, name: str, upload: str) -> None:
        """End a multipart upload without an object."""
        self._call("abort_multipart_upload", "deleting", Key=self.prefix + name, UploadId=upload)

    # -- underneath

    def _pages(self, below: str, **more: Any) -> Iterable[dict[str, Any]]:
        while True:
            page = self._call("list_objects_v2", "listing", Prefix=self.prefix + below, MaxKeys=PAGE, **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more["ContinuationToken"] = page["NextContinuationToken"]

    def _call(self, method: str, word: str, **arguments: Any) -> Any:
        key = arguments.get("Key") or arguments.get("Prefix") or ""
        fs = connection()
        return self._ask(f"{word} s3://{self.bucket}/{key}", lambda: fs._call_s3(method, Bucket=self.bucket, **arguments))

    def _ask(self, what: str, work: Callable[[], Any], size: int = 0) -> Any:
        from fsspec.asyn import sync

        started, pause, broken = time.monotonic(), 1.0, 0
        while True:
            try:
                result = sync(connection().loop, work, timeout=LIMITS.deadline + size / LIMITS.slowest)
            except Exception as error:
                trouble = self._explain(error, what)
                if trouble is error:
                    raise
                broken += isinstance(trouble, Cut | Garbled)
                if 0 < broken < LIMITS.attempts:  # botocore tries again only until an answer begins
                    continue
                if isinstance(trouble, Taken | Missing):
                    self._answered = True
                left = LIMITS.patience - (time.monotonic() - started)
                passes = isinstance(trouble, Unreachable) and not isinstance(trouble, Garbled)
                if not passes or not self._answered or left <= 0:
                    raise trouble from error
                logger.warning("%s; trying again for %.0f s", trouble, left)
                time.sleep(min(pause, left))
                pause = min(pause * 2, 30.0)
            else:
                self._answered = True
                return result

    def _explain(self, error: Exception, what: str) -> Exception:
        """What to raise: Taken, Missing, Unreachable; ValueError for what the user can mend; a local error as it is."""
        from botocore.exceptions import (
            BotoCoreError,
            CredentialRetrievalError,
            FlexibleChecksumError,
            IncompleteReadError,
            NoCredentialsError,
            PartialCredentialsError,
            ProfileNotFound,
            ResponseStreamingError,
        )

        answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        place = f"store {self.uri}"
        if isinstance(answer, dict):
            code = str(answer.get("Error", {}).get("Code", ""))
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code in CONFLICTS:
                return Taken(what)
            if code == "NoSuchBucket":
                return ValueError(
                    f"{place}: there is no bucket {self.bucket} at {self._endpoint()}: make it, or name another --store"
                )
            if code in MISSING:
                return Missing(what)
            if code in WORN_OUT:
                return StoreError(
                    f"{place}: {what}: {code}: the credentials are no longer valid (or this clock is wrong): renew them"
                )
            if code in NOT_OURS:
                return ValueError(
                    f"{place}: {what}: no access ({code}): the AWS credentials in use need to list, get, put and delete there"
                )
            if code in ELSEWHERE:
                return ValueError(f"{place}: {what}: {code}: is the bucket in another region? Set AWS_REGION, or AWS_ENDPOINT_URL")
            if code in PASSING or status >= 500 or status == 429:
                return Unreachable(f"{place}: {what}: {self._endpoint()} answered {code or status}: run again later")
            return StoreError(f"{place}: {what}: {code or status}: {one_line(error)}")
        if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound | CredentialRetrievalError):
            return ValueError(
                f"{place}: no AWS credentials ({type(error).__name__}): set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or use a role"
            )
        if isinstance(error, FlexibleChecksumError):
            return Garbled(f"{place}: {what}: the answer of {self._endpoint()} does not fit its checksum: run again later")
        if isinstance(error, IncompleteReadError | ResponseStreamingError) or "Payload" in type(error).__name__:
            return Cut(f"{place}: {what}: the answer of {self._endpoint()} broke off: run again later")
        of_the_net = isinstance(error, BotoCoreError | ConnectionError) or type(error).__module__.startswith(("aiohttp", "fsspec"))
        if isinstance(error, OSError) and error.errno is not None and not of_the_net:
            return error  # of this machine's disk
        if of_the_net or isinstance(error, OSError):
            return Unreachable(
                f"{place}: {what}: no usable answer from {self._endpoint()} ({type(error).__name__}): is it up, is "
                "AWS_ENDPOINT_URL right?"
            )
        if isinstance(error, ValueError):  # its text has the whole address, with all that somebody may have put into it
            return ValueError(f"{place}: {what}: is AWS_ENDPOINT_URL an address such as http://host:9000?")
        return error

    def _endpoint(self) -> str:
        """Scheme, host and port, without what else an address may hold."""
        url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.hostname}{port}" if parts.hostname else "AWS"


_connections: dict[tuple[int, int, Limits], Any] = {}


def connection() -> Any:
    """s3fs, one for all buckets. It is not fork-safe, so every process has its own; another environment has another, too."""
    settings = hash(frozenset((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    mine = (os.getpid(), settings, LIMITS)
    if mine not in _connections:
        import s3fs

        # at DEBUG botocore logs the headers that it signs, and a session token is one of them
        for name in ("botocore", "aiobotocore"):
            logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger(name).level))
        fs = s3fs.S3FileSystem(
            skip_instance_cache=True,  # nobody else's settings
            use_listings_cache=False,  # or another writer's new object "does not exist"
            config_kwargs={
                "connect_timeout": LIMITS.connect,
                "read_timeout": LIMITS.read,
                "retries": {"mode": "standard", "max_attempts": LIMITS.attempts},
            },
        )
        fs.retries = 2  # s3fs's own, on top; a download goes on where it was cut
        _connections[mine] = fs
    return _connections[mine]


def in_parallel(work: Callable[[Any], Any], items: Iterable[Any]) -> Sequence[Any]:
    """`work` on several items at once, in their order; the first error ends it."""
    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="s3") as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise
