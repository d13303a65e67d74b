"""A storage account as Azure's connection string names it, in the variables that obstore reads."""

from __future__ import annotations

from collections.abc import Mapping


def azure_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The fields of AZURE_STORAGE_CONNECTION_STRING by variable, without variables that are set already.

    Empty where there is none, or where AZURE_STORAGE_ACCOUNT_NAME names an account, too, which is then used.
    A text that is no connection string names no account; that is reported when a store of Azure is opened.
    """
    text = environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    if not text or environ.get("AZURE_STORAGE_ACCOUNT_NAME"):
        return {}
    pairs = (field.strip().partition("=") for field in text.split(";"))
    fields = {name.lower(): value for name, _, value in pairs}  # Azure's own clients take any case
    account, endpoint = fields.get("accountname", ""), fields.get("blobendpoint", "").rstrip("/")
    # A string with a shared access signature names the endpoint alone.
    account = account or endpoint.partition("://")[2].partition(".")[0]
    suffix, scheme = fields.get("endpointsuffix", "core.windows.net"), fields.get("defaultendpointsprotocol", "https")
    variables = {
        "AZURE_STORAGE_ACCOUNT_NAME": account,
        "AZURE_STORAGE_ENDPOINT": endpoint or f"{scheme}://{account}.blob.{suffix}",
        "AZURE_STORAGE_ACCOUNT_KEY": fields.get("accountkey", ""),
        "AZURE_STORAGE_SAS_TOKEN": fields.get("sharedaccesssignature", "").removeprefix("?"),
    }
    return {name: value for name, value in variables.items() if value and not environ.get(name)} if account else {}
