"""Download released checkpoints through huggingface_hub: its cache, its retries, its token, its environment.

HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to that library.
"""

from __future__ import annotations

from pathlib import Path

from .model_config import TEXT_SUBFOLDER

FILES = (
    "model_config.json",
    "model.safetensors",
    f"{TEXT_SUBFOLDER}/config.json",
    f"{TEXT_SUBFOLDER}/model.safetensors",
    f"{TEXT_SUBFOLDER}/tokenizer.json",
)


class DownloadError(OSError):
    """Say in one line why a released checkpoint could not be had and what to do."""


def download(repository: str) -> Path:
    """Return the folder, in the hub's cache, with the files of a released checkpoint. Raises DownloadError."""
    from huggingface_hub import get_token, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    page = f"https://huggingface.co/{repository}"
    try:
        return Path(snapshot_download(repository, allow_patterns=list(FILES)))
    except HfHubHTTPError as error:  # gated and missing repositories among them
        if error.response is not None and error.response.status_code in (401, 403, 404):
            token = "" if get_token() else " (no access token found)"
            raise DownloadError(
                f"{repository}: access refused{token}; accept the licence at {page} and log in with 'hf auth login'"
            ) from error
        raise DownloadError(f"{repository}: the hub refused the download: {_first_line(error)}") from error
    except LocalEntryNotFoundError as error:
        if _offline():
            raise DownloadError(
                f"{repository}: offline (HF_HUB_OFFLINE is set) and not complete in the local cache; "
                f"connect once, or give a folder with the files of {page}"
            ) from error
        reason = _first_line(error.__cause__ or error)
        raise DownloadError(
            f"{repository}: cannot reach the hub ({reason}); check the network and run again"
        ) from error
    except Exception as error:  # whatever its HTTP library raises in the middle of a file, a full disk
        raise DownloadError(
            f"{repository}: download failed ({_first_line(error)}); run again, what is complete is kept"
        ) from error


def _offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
