"""What a run does after its last stage, where its recipe names a repository: its result onto the Hub, with exports."""

from __future__ import annotations

from pathlib import Path

from ..errors import EdgeDiTError
from ..hub import explain
from ..run.config import RunConfig
from ..run.stage import EXPORT, Stage
from .push import plan, push


def places(config: RunConfig, made: Stage) -> dict[str, Path]:
    """Repositories that a run pushes to, and the folders that go there; none where its recipe names none.

    Args:
        made: the stage whose net ships.
    """
    if config.hub.push_to is None:
        return {}
    found = {config.hub.push_to: config.folder(made.folder)}
    if config.hub.exports:
        for path in sorted(config.folder(EXPORT.folder).glob("*-*/contract.json")):
            found[f"{config.hub.push_to}-{path.parent.name}"] = path.parent
    return found


def push_run(config: RunConfig, made: Stage) -> None:
    """Push what a finished run made, one repository after the other, and print where it is; run again, it sends what is
    missing.

    Args:
        made: the stage whose net ships.
    """
    hub = config.hub
    for repo_id, folder in places(config, made).items():
        planned = plan(
            folder,
            repo_id,
            license=None if config.card.license == "other" else config.card.license,
            base_model=hub.base_model,
            report=config.folder("report.json"),
        )
        done = push(planned, private=hub.private, collection=hub.collection)
        print(f"{done.url} at {done.commit[:12]}{'' if done.changed else ' (nothing had changed)'}")


def check_push(config: RunConfig) -> None:
    """Raise if a run's result could not be pushed: before its first stage, not after its last.

    Raises:
        EdgeDiTError: the Hub cannot be reached, does not know the token, or it may not write; or the licence is
            missing.
    """
    from huggingface_hub import HfApi

    if config.hub.push_to is None:
        return
    if config.card.license == "other":
        raise EdgeDiTError(
            f"hub.push_to is {config.hub.push_to!r}, but card.license is 'other': readers must know what they may do; "
            "give the licence that your data and teacher leave you, such as apache-2.0 or cc-by-nc-4.0."
        )
    try:
        who = HfApi().whoami()
    except Exception as error:  # of the client and of its HTTP library: without a common base
        raise explain(error, f"hub.push_to {config.hub.push_to}") from error
    owners = [who["name"], *(org["name"] for org in who.get("orgs", []))]
    owner = config.hub.push_to.split("/")[0] if "/" in config.hub.push_to else who["name"]
    if owner not in owners:
        raise EdgeDiTError(
            f"hub.push_to is {config.hub.push_to!r}, but the token is that of {who['name']!r}, who writes as "
            f"{', '.join(owners)}; name one of these, or log in as another."
        )
    if (who.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise EdgeDiTError(
            f"hub.push_to is {config.hub.push_to!r}, but the token of {who['name']!r} may only read; log in with one "
            "that may write (hf auth login)."
        )
