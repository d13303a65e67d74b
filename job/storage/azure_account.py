"""A storage account as Azure's connection string names it, in the variables that obstore reads."""

from __future__ import annotations

from collections.abc import Mapping


def azure_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What AZURE_STORAGE_CONNECTION_STRING says, by variable.

    Empty where there is none, or where AZURE_STORAGE_ACCOUNT_NAME names an account beside it, which is then the one.
    What is no connection string names no account; obstore says so if a store of Azure is opened.
    """
    text = environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    if not text or environ.get("AZURE_STORAGE_ACCOUNT_NAME"):
        return {}
    fields = dict(field.strip().partition("=")[::2] for field in text.split(";"))
    account, endpoint = fields.get("AccountName", ""), fields.get("BlobEndpoint", "").rstrip("/")
    # A string with a shared access signature names the endpoint alone.
    account = account or endpoint.partition("://")[2].partition(".")[0]
    suffix, scheme = fields.get("EndpointSuffix", "core.windows.net"), fields.get("DefaultEndpointsProtocol", "https")
    found = {
        "AZURE_STORAGE_ACCOUNT_NAME": account,
        "AZURE_STORAGE_ENDPOINT": endpoint or f"{scheme}://{account}.blob.{suffix}",
        "AZURE_STORAGE_ACCOUNT_KEY": fields.get("AccountKey", ""),
        "AZURE_STORAGE_SAS_TOKEN": fields.get("SharedAccessSignature", "").removeprefix("?"),
    }
    return {name: value for name, value in found.items() if value} if account else {}
