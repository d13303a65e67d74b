"""Locations (URIs and paths) that users give, the table of stores, and the options for opening a store."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from job.common.secrets_in_text import secret_in, shown
from job.errors import Problem, SettingsError
from job.storage.base import check_key

if TYPE_CHECKING:
    from typing import Self

LOCAL = ""
"""The scheme of a path."""
BACKENDS = {
    LOCAL: "job.storage.local:LocalStore",
    "s3": "job.storage.s3:S3Store",
    "gs": "job.storage.gcs:GcsStore",
    "az": "job.storage.azure:AzureStore",
}
"""Scheme -> the store's class, by name: its module, and the client library with it, is imported when it is opened."""
# Names of today's and of older buckets, and aliases of access points.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}")
# Ends of the names of S3's directory buckets, and of access points to them. AWS reserves both.
_DIRECTORY_BUCKETS = ("--x-s3", "--xa-s3")


@dataclass(frozen=True)
class StorageOptions:
    """How stores are reached: the settings group `storage` without `cache`. Credentials are no options.

    Attributes:
        endpoint_url: Address of another server that speaks S3's protocol; None for AWS. For S3 alone: a run may read
            from one cloud and write to another.
        region: AWS region; None for what the environment says. For S3 alone.
        kms_key_id: Key for SSE-KMS; None for the bucket's own encryption. Other stores refuse to write with one.
        storage_class: Storage class of uploaded files; small objects, which are rewritten and read again, stay in the
            standard one.
        request_payer: Pay for requests to a requester-pays bucket. For S3 alone.
        timeout_seconds: How long one request, or 256 KiB of a download, may take.
        retries: How often a request is tried at most, the first time included; `base.REQUEST_PAUSES` are between.
    """

    endpoint_url: str | None = None
    region: str | None = None
    kms_key_id: str | None = None
    storage_class: str | None = None
    request_payer: bool = False
    timeout_seconds: float = 60.0
    retries: int = 8


def storage_options(group: object) -> StorageOptions:
    """The options of the settings group `storage`."""
    return StorageOptions(**{field.name: getattr(group, field.name) for field in fields(StorageOptions)})


@dataclass(frozen=True)
class Location:
    """A parsed place: `scheme://bucket/key`, or a path, whose scheme and bucket are empty and whose key is the path.

    `folder` says that a URI ended in a slash, which means all objects below it.
    """

    scheme: str
    bucket: str
    key: str
    folder: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses a URI of a store in the table, or a path.

        Raises:
            SettingsError: It is empty, has a secret in it, another scheme, or a bucket or key that no store can have.
        """
        if (secret := secret_in(text)) is not None:
            raise SettingsError([Problem(shown(text), secret)])
        scheme, separator, rest = text.partition("://")
        if not text or (separator and scheme not in schemes()):
            known = " nor ".join(f"{scheme}://bucket/prefix" for scheme in schemes())
            # Another program's address: what is behind the ? may be a secret under any name.
            raise SettingsError([Problem(shown(text) if separator else "''", f"is neither {known} nor a path")])
        if not separator:
            if (problem := mistyped(text)) is not None:
                raise SettingsError([Problem(text, problem)])
            return cls(LOCAL, "", text)
        if (bucket_problem := unusable_bucket(scheme, rest)) is not None:
            raise SettingsError([Problem(text, bucket_problem)])
        bucket, _, key = rest.partition("/")
        key = key.removesuffix("/")
        if not _BUCKET.fullmatch(bucket):
            raise SettingsError([Problem(text, f"has no valid bucket name; write {scheme}://bucket/prefix")])
        try:
            return cls(scheme, bucket, check_key(key) if key else "", text.endswith("/"))
        except ValueError as error:
            raise SettingsError([Problem(text, str(error))]) from None

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def parent(self) -> Location:
        """The place above it in the same bucket; the bucket itself is its own parent."""
        return replace(self, key=self.key.rpartition("/")[0], folder=False)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".removesuffix("/") if self.scheme else self.key


def is_remote(place: str) -> bool:
    """Whether a place that was checked before is the URI of a store, and not a path or hub id."""
    return "://" in place


def mistyped(text: str) -> str | None:
    """What is wrong with a URI of a store that lacks its colon or a slash; None for a path.

    Read as a path, it would put the results into a folder that is lost with the machine.
    """
    match = re.match(rf"({'|'.join(schemes())})(:/?|//)(?!/)(.*)", text)
    if match is None:
        return None
    scheme, separator, rest = match.groups()
    lacks = {":/": "has one slash after the colon", ":": "has no slashes after the colon", "//": "has no colon"}[
        separator
    ]
    return f"{lacks}; write {scheme}://{rest or 'bucket/prefix'}, or ./ before a path"


def unusable_bucket(scheme: str, rest: str) -> str | None:
    """Why the store cannot be the one that a URI names behind `scheme://`; None for all others.

    A directory bucket lists in no order, and only prefixes that end in a slash. The contract of stores promises sorted
    listings, and `S3Store` confirms by a listing that an object is absent. Source:
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/s3-express-differences.html
    """
    if scheme != "s3":
        return None
    if rest.startswith("arn:"):
        fix = "write the alias of the access point, which ends in -s3alias, or the name of the bucket"
        return f"is an ARN, which s3:// does not take; {fix}"
    if rest.partition("/")[0].endswith(_DIRECTORY_BUCKETS):
        why = "which lists objects in no order, and only below prefixes that end in a slash"
        fix = "the job needs sorted listings by any prefix; use a general purpose bucket"
        return f"is in a directory bucket (S3 Express One Zone), {why}; {fix}"
    return None


def schemes() -> list[str]:
    """The schemes of URIs that are understood: those of the table, except the empty one of paths."""
    return [scheme for scheme in BACKENDS if scheme != LOCAL]


def join(folder: str, name: str) -> str:
    """The place of this name below a folder that is a URI or a path."""
    return f"{folder.rstrip('/')}/{name}"
