"""Folders to the Hugging Face hub."""

from pathlib import Path

from pipeline.common.errors import ConfigError, PipelineError


def check_repo_name(repo: str) -> None:
    """Raises `ConfigError` for what no repository can be called."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not listed

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push {repo!r} is not the name of a repository: {_first_line(error)}") from None


def push(folder: Path, repo: str) -> str:
    """Uploads what is in `folder` to the model repository `repo`, made private if it is not there; its URL.

    Raises `PipelineError` with what to do about it; the folder stays as it is.
    """
    from huggingface_hub import create_repo, upload_folder

    try:
        url = create_repo(repo, private=True, exist_ok=True)
        upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {folder.name}")
    except Exception as error:  # of the network, too, whose errors have no base of their own
        raise PipelineError(
            f"{folder} is whole, but not on the hub: {_reason(error, repo)}. Then: hf upload {repo} {folder}"
        ) from error
    return str(url)


def _reason(error: Exception, repo: str) -> str:
    from huggingface_hub.errors import LocalTokenNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return "no valid token; `hf auth login`, or set HF_TOKEN to one that may write"
    if status == 403:
        return f"the token has no right to write to {repo}; use another name, or a token that may write"
    if status is None:
        return f"no connection ({_first_line(error)}); check the network, and that HF_HUB_OFFLINE is not set"
    return f"the hub answers {status} ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
