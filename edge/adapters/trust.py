"""Decides which adapters a machine takes: if it has trusted keys, those that one of them signed.

The policy is that of bundles (`edge.bundle.trust`). The signature is ``SHA256SUMS.minisig`` beside
the weights. It signs what ``sha256sum`` prints for config and weights together, so the config of
one adapter cannot be used with the weights of another. ``SHA256SUMS`` itself is never read: its
text is computed again here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge.bundle.minisign import find_signer
from edge.bundle.trust import trusted_keys_file
from edge.errors import CheckpointError

from .peft_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS

SIGNATURE_NAME = "SHA256SUMS.minisig"
_NAMES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)


def check_trusted(
    path: Path, weights: Path, hashes: Sequence[Any], trusted_keys: Path | None
) -> None:
    """Check an adapter against the machine's policy.

    Args:
        path: the adapter's path as the user gave it, for messages.
        weights: file of its weights.
        hashes: SHA-256 of its config and of its weights.
        trusted_keys: the option, as `trusted_keys_file` takes it.

    Raises:
        CheckpointError: there is a policy, and no trusted key has signed the adapter.
        ConfigError: the file of trusted keys cannot be used.
    """
    policy = trusted_keys_file(trusted_keys)
    if policy is None:
        return
    sums = "".join(f"{h.hexdigest()}  {name}\n" for h, name in zip(hashes, _NAMES, strict=True))
    signer = find_signer(weights.with_name(SIGNATURE_NAME), sums.encode(), policy, "adapters")
    if isinstance(signer, str):
        raise CheckpointError(
            f"the adapter {path} is refused, as {policy} demands a signature: {signer}; sign it "
            f"there with: sha256sum {' '.join(_NAMES)} > SHA256SUMS && minisign -Sm SHA256SUMS"
        )
