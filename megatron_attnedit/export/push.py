"""``--push``: upload an exported directory to the Hugging Face Hub."""

import logging
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from megatron_attnedit.errors import UserError

logger = logging.getLogger(__name__)


def check_push(repo: str) -> None:
    """Find out before the work whether an upload can begin.

    Raises:
        UserError: not a repository's name, no token, or the network is switched off.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: {_line(error)}") from None
    if constants.is_offline_mode():
        raise UserError(f"--push {repo}: HF_HUB_OFFLINE is set; unset it to upload")
    if get_token() is None:
        raise UserError(f"--push {repo}: no token; set HF_TOKEN or log in with hf auth login")


def push(folder: Path, repo: str) -> str:
    """Upload all files of a folder; the repository is made where it is missing, private.

    Returns:
        Its address.

    Raises:
        UserError: the Hub refuses or cannot be reached; the folder stays as it is.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message=f"Upload {folder.name}"
        )
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"--push {repo}: {folder} is written, but not uploaded: {_line(error)}"
        ) from None
    logger.info("uploaded %s to %s", folder, url)
    return str(url)


def _line(error: Exception) -> str:
    """The first line of a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
