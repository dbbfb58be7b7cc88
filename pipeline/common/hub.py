"""Uploads folders to the Hugging Face hub."""

from pathlib import Path

from pipeline.common.errors import ConfigError, PipelineError


def check_repo_name(repo: str) -> None:
    """Check the name of a repository.

    Raises:
        ConfigError: the name is invalid.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in __all__

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push {repo!r} is not a valid repository name: {_first_line(error)}") from None


def push(folder: Path, repo: str) -> str:
    """Upload `folder` to a model repository, which is created as private if it does not exist.

    Returns:
        The URL of the repository.

    Raises:
        PipelineError: the upload failed; the folder is unchanged.
    """
    from huggingface_hub import create_repo, upload_folder

    try:
        url = create_repo(repo, private=True, exist_ok=True)
        upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {folder.name}")
    except Exception as error:  # includes network errors, which have no common base class
        raise PipelineError(
            f"{folder} is complete, but was not uploaded: {_reason(error, repo)}. Then run: hf upload {repo} {folder}"
        ) from error
    return str(url)


def _reason(error: Exception, repo: str) -> str:
    from huggingface_hub.errors import LocalTokenNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return "no valid token; run `hf auth login`, or set HF_TOKEN to a token with write access"
    if status == 403:
        return f"the token has no write access to {repo}; use another name, or a token with write access"
    if status is None:
        return f"no connection ({_first_line(error)}); check the network, and that HF_HUB_OFFLINE is not set"
    return f"the hub returned status {status} ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
