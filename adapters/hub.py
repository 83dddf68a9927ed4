"""Adapters and their bases on the Hugging Face Hub: a repository for each, safetensors only, one commit per push.

The Hub, the cache and the token are those of huggingface_hub (HF_ENDPOINT, HF_HOME, `hf auth login` or HF_TOKEN).
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    ModelCard,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that huggingface_hub uses, whichever that is
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

from configuration_mrl_redimnet import MRLReDimNetError
from mrl_redimnet.adapters.facts import FACTS_FILE, AdapterFacts
from mrl_redimnet.adapters.placement import PLACEMENTS
from mrl_redimnet.files import refuse_missing
from mrl_redimnet.hub_cards import HUB_RESULTS, PLACEHOLDER
from mrl_redimnet.saving import code_files, load_model, packaged_adapters, packaged_models

ALLOWED = ("*.safetensors", "*.json", "*.md", "*.png", "*.jpg", "*.svg", f"{HUB_RESULTS}/*.yaml")
ALLOWED_IN_BASE = (*ALLOWED, "*.py")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")  # reading one runs whatever code is in it
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
LOGIN = "Log in with `hf auth login`, set HF_TOKEN, or pass a token"


class HubError(MRLReDimNetError, OSError):
    """What could not be done at the Hub, why, and what to do."""


@dataclass(frozen=True)
class Pushed:
    """What a push did. changed: False where the Hub had it all already, so that no commit was made.

    commit: the state of the repository that holds the folder. left_out: files of the folder that are not for the Hub.
    collection: the address of the collection that it was put into.
    """

    repository: str
    commit: str
    url: str
    changed: bool
    left_out: tuple[str, ...]
    collection: str | None = None


@dataclass(frozen=True)
class AdapterRow:
    """An adapter found on the Hub. domain: None where the card names none (an adapter not pushed from here)."""

    repository: str
    domain: str | None
    revision: str
    modified: datetime | None
    downloads: int | None
    private: bool


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter, without its weights.

    facts: None for an adapter made with PEFT alone. base: what PEFT's configuration names. placement: a name in
    PLACEMENTS, else the layers as the configuration names them. size: of the weights' file, in bytes. revision: the
    commit, None for a folder.
    """

    source: str
    facts: AdapterFacts | None
    base: str | None
    rank: int | None
    placement: str
    parameters: int
    size: int
    revision: str | None


def default_repository(base: str, domain: str) -> str:
    """Where the adapter of a domain goes by default: "<user>/<base name>-<domain>"."""
    return f"{base}-{domain}"


def push_adapter(
    folder: str | Path,
    repository: str,
    *,
    base: str | None = None,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    token: str | None = None,
    message: str | None = None,
    collection: bool = False,
) -> Pushed:
    """Puts the adapter in `folder` into `repository`, in one commit; it is made if need be, `private` or not.

    base: the repository of the base, where the folder names one that was on this machine only. revision: a branch, made
    if need be. tag: for the commit. The folder stays as it is; in what is sent, PEFT's configuration and the card's
    metadata name the base's repository, and no path on this machine. What the repository has beyond the folder stays.
    collection: also puts base and adapter into the collection "Adapters of BASE" of the repository's owner; it is made
    if need be, private like the repository.

    Raises HubError; a push that broke off happened whole or not at all, and can be repeated.
    """
    folder = Path(folder)
    sent, left_out = _files(folder, ALLOWED)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in sent:
            raise HubError(
                f"{folder} is no adapter: it has no {name}. Give a folder that save_pretrained of PEFT wrote."
            )
    naming = _naming_the_base(folder, repository, base)
    sent |= naming
    _check_paths(folder, sent)
    facts = _facts(folder)
    domain = "adapter" if facts is None else facts.domain
    base = json.loads(naming[CONFIG_FILE])["base_model_name_or_path"]
    if collection:
        with _explained(f"Cannot collect the adapters of {base}", base, None, token):
            HfApi(token=token).model_info(base)
    pushed = _push(sent, left_out, repository, private, revision, tag, token, message or f"Adapter: {domain}")
    return replace(pushed, collection=_collect(repository, base, token)) if collection else pushed


def push_base(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> Pushed:
    """Puts a model that `mrl_redimnet.saving.save_model` wrote into `repository`; the rest is as in `push_adapter`.

    folder: or the name of a model that comes with the package, where there is no such folder.
    """
    packaged = packaged_models().get(str(folder)) if not Path(folder).is_dir() else None
    folder = packaged or Path(folder)
    sent, left_out = _files(folder, ALLOWED_IN_BASE)
    if packaged is not None:
        sent |= {file.name: file for file in code_files()}
    if "config.json" not in sent or not any(name.endswith(".safetensors") for name in sent):
        raise HubError(f"{folder} is no model: it lacks config.json or model.safetensors. Save it with save_model.")
    if missing := sorted(_modules_named(folder, sent) - sent.keys()):
        raise HubError(f"{folder} lacks {', '.join(missing)}, so that nobody could load it. Save it with save_model.")
    try:
        load_model(folder)  # what cannot be loaded is of no use to anybody
    except (ValueError, OSError) as error:
        raise HubError(f"{folder} cannot be loaded, so it is not pushed: {error}") from error
    if "README.md" in sent:
        sent["README.md"] = _read(folder / "README.md").replace(PLACEHOLDER, repository).encode()
    _check_paths(folder, sent)
    return _push(sent, left_out, repository, private, revision, tag, token, message or "Model")


def _modules_named(folder: Path, sent: Mapping[str, Path | bytes]) -> set[str]:
    """The Python files beside a model that its configurations name, or that such a file imports."""
    named = set()
    for name in sent.keys() & {"config.json", "preprocessor_config.json"}:
        config = _json(folder / name)
        pipelines = (config.get("custom_pipelines") or {}).values()
        classes = [*(config.get("auto_map") or {}).values(), *(pipeline["impl"] for pipeline in pipelines)]
        named |= {path.split(".")[0] for path in classes}
    for file in sent.values():
        if isinstance(file, Path) and file.suffix == ".py":
            named |= set(get_relative_imports(file))
    return {f"{module}.py" for module in named}


def pull(
    repository: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool | None = None,
) -> Path:
    """An adapter or a base in the cache, downloaded as far as it is not there.

    revision: branch, tag or commit. local_files_only: without asking the Hub, by default as HF_HUB_OFFLINE says.
    Raises HubError, and for weights that exist as pickle only before they are downloaded.
    """
    _check_id(repository)
    offline = constants.HF_HUB_OFFLINE if local_files_only is None else local_files_only
    with _explained(f"Cannot pull {repository}", repository, revision, token):
        if not offline:
            info = HfApi(token=token).model_info(repository, revision=revision)
            _check_pulled(repository, [file.rfilename for file in info.siblings])
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                token=token,
                local_files_only=offline,
                allow_patterns=list(ALLOWED_IN_BASE),
            )
        )
    if offline:
        _check_pulled(repository, [path.name for path in folder.iterdir()])
    return folder


def list_adapters(base: str, *, author: str | None = None, token: str | None = None) -> list[AdapterRow]:
    """The adapters on the Hub whose cards name `base`, private ones as far as the token may see them; by name.

    author: only this user's or organisation's. Raises HubError.
    """
    _check_id(base)
    details = ["author", "downloads", "lastModified", "private", "sha", "tags"]
    with _explained(f"Cannot list the adapters of {base}", base, None, token):
        found = HfApi(token=token).list_models(filter=f"base_model:adapter:{base}", author=author, expand=details)
        rows = [
            AdapterRow(
                model.id,
                next((tag.removeprefix("domain:") for tag in model.tags or () if tag.startswith("domain:")), None),
                model.sha,
                model.last_modified,
                model.downloads,
                bool(model.private),
            )
            for model in found
        ]
    return sorted(rows, key=lambda row: row.repository)


def adapter_info(source: str | Path, *, revision: str | None = None, token: str | None = None) -> AdapterInfo:
    """What there is to know of the adapter in a folder, the package or a repository; of its weights only the header is
    read.

    Raises HubError.
    """
    if Path(source).is_dir():
        return _local_info(Path(source), str(source), None)
    if (packaged := packaged_adapters().get(str(source))) is not None:
        return _local_info(packaged, str(source), None)
    repository = str(source)
    _check_id(repository)
    if constants.HF_HUB_OFFLINE:
        folder = pull(repository, revision=revision)
        return _local_info(folder, repository, folder.name)
    api = HfApi(token=token)
    with _explained(f"Cannot look at {repository}", repository, revision, token):
        info = api.model_info(repository, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size for file in info.siblings}
        _check_pulled(repository, sizes)
        if not {CONFIG_FILE, WEIGHTS_FILE} <= sizes.keys():
            raise HubError(f"{repository} is no adapter: it lacks {CONFIG_FILE} or {WEIGHTS_FILE}.")
        small = snapshot_download(repository, revision=info.sha, token=token, allow_patterns=[CONFIG_FILE, FACTS_FILE])
        header = api.parse_safetensors_file_metadata(repository, WEIGHTS_FILE, revision=info.sha)
    parameters = sum(tensor.parameter_count for tensor in header.tensors.values())
    return _info(Path(small), repository, parameters, sizes[WEIGHTS_FILE], info.sha)


def _local_info(folder: Path, source: str, revision: str | None) -> AdapterInfo:
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise HubError(f"{source} is no adapter: it lacks {CONFIG_FILE} or {WEIGHTS_FILE}.")
    parameters = _parameters(folder / WEIGHTS_FILE)
    return _info(folder, source, parameters, (folder / WEIGHTS_FILE).stat().st_size, revision)


def _info(folder: Path, source: str, parameters: int, size: int, revision: str | None) -> AdapterInfo:
    config = _json(folder / CONFIG_FILE)
    targets = config.get("target_modules") or ()
    names = {rule: name for name, rule in PLACEMENTS.items()}
    placement = names.get(targets, targets) if isinstance(targets, str) else ", ".join(sorted(targets))
    return AdapterInfo(
        source=source,
        facts=_facts(folder),
        base=config.get("base_model_name_or_path"),
        rank=config.get("r"),
        placement=placement,
        parameters=parameters,
        size=size,
        revision=revision,
    )


def _parameters(weights: Path) -> int:
    """Numbers in a safetensors file, from its header. Raises HubError for a file that is none, or not whole."""
    try:
        with safe_open(weights, "pt") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    except SafetensorError as error:
        raise HubError(f"{weights} is not a whole safetensors file: {error}. Save it again.") from error


def _files(folder: Path, allowed: Iterable[str]) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    """What of `folder` goes to the Hub, by its name there, and the names of the rest. Hidden files are passed
    over, but for results in the Hub's form.

    Raises HubError where there is no folder, and for pickled or broken weights.
    """
    if not folder.is_dir():
        raise HubError(f"{folder} is not a folder.")
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    seen = {name: name.removeprefix(f"{HUB_RESULTS}/").split("/") for name in paths}
    paths = {name: path for name, path in paths.items() if not any(part.startswith(".") for part in seen[name])}
    if pickled := [*filter_repo_objects(paths, allow_patterns=list(PICKLED))]:
        raise HubError(
            f"{folder} holds pickled data, which runs code when it is read: {', '.join(pickled)}. Only safetensors go "
            "to the Hub: save weights with save_pretrained, keep optimiser states elsewhere."
        )
    sent = [*filter_repo_objects(paths, allow_patterns=list(allowed))]
    for name in sent:
        if name.endswith(".safetensors"):
            _parameters(paths[name])
    return {name: paths[name] for name in sent}, tuple(name for name in paths if name not in sent)


def _naming_the_base(folder: Path, repository: str, base: str | None) -> dict[str, bytes]:
    """The files of an adapter that name its base, with the base's repository for whatever they name."""
    config, facts = _json(folder / CONFIG_FILE), _facts(folder)
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if facts is not None:
        named, revision = facts.base.repository, facts.base.revision
    if base is None:
        base = _published(folder, named)
    else:
        _check_id(base, owned=True)
        revision = revision if base == named else None
    stale = {name for name in (config.get("base_model_name_or_path"), named) if name and name != base}
    edited = {CONFIG_FILE: _dump(config | {"base_model_name_or_path": base, "revision": revision}, indent=2)}
    if facts is not None:
        content = _json(folder / FACTS_FILE)
        edited[FACTS_FILE] = _dump(content | {"base": content["base"] | {"repository": base, "revision": revision}})
    edited["README.md"] = _card(folder, repository, base, stale, facts).encode()
    return edited


def _check_paths(folder: Path, sent: dict[str, Path | bytes]) -> None:
    """Raises HubError where a text to be sent says where on this machine the folder or the adapter's base lies."""
    config = folder / CONFIG_FILE
    base = _json(config).get("base_model_name_or_path") if config.is_file() else None
    private = {str(folder.resolve())} | ({base} if base and os.path.isabs(base) else set())
    for name, content in sent.items():
        if name.endswith((".json", ".md", ".py", ".yaml")):
            content = content if isinstance(content, bytes) else content.read_bytes()
            for path in private:
                if path.encode() in content:
                    raise HubError(f"{folder / name} says {path}, a place on this machine. Remove it, then push again.")


def _published(folder: Path, named: str | None) -> str:
    """The base's repository as the adapter tells it. Raises HubError for one that is on this machine only."""
    try:
        _check_id(named or "", owned=True)
    except HubError as error:
        raise HubError(
            f"{folder} names {named!r} as its base, which is not a repository on the Hub. Push the base first, then "
            "push the adapter with base= (--base) its repository."
        ) from error
    if named is None or Path(named).is_dir():
        raise HubError(
            f"{folder} names {named!r} as its base, a folder here. Push with base= the repository it is in (or, if "
            "that is just its name, base= the same)."
        )
    return named


def _card(folder: Path, repository: str, base: str, stale: set[str], facts: AdapterFacts | None) -> str:
    """README.md with metadata by which the Hub finds the adapter; as it is where it has them already."""
    file = folder / "README.md"
    name = repository.split("/")[-1]
    text = _read(file) if file.is_file() else f"# {name}\n\nA LoRA adapter (PEFT) on `{base}`.\n"
    text = text.replace(PLACEHOLDER, repository)
    for local in sorted(stale, key=len, reverse=True):
        for quoted in ("{}",) if os.path.isabs(local) else ('"{}"', "`{}`"):  # a short name may be part of a word
            text = text.replace(quoted.format(local), quoted.format(base))
    try:
        card = ModelCard(text)
    except (yaml.YAMLError, ValueError) as error:
        raise HubError(f"{file}: the metadata at its start is not valid: {error}") from error
    tags = [tag for tag in card.data.tags or () if not tag.startswith(("base_model:", "domain:"))]
    tags += ["lora"] * ("lora" not in tags) + [f"base_model:adapter:{base}"]
    tags += [f"domain:{facts.domain}"] if facts is not None else []
    wanted = {"base_model": base, "library_name": "peft", "tags": tags}
    if all(card.data.get(key) == value for key, value in wanted.items()):
        return text
    for key, value in wanted.items():
        card.data[key] = value
    return str(card)


def _push(
    sent: dict[str, Path | bytes],
    left_out: tuple[str, ...],
    repository: str,
    private: bool,
    revision: str | None,
    tag: str | None,
    token: str | None,
    message: str,
) -> Pushed:
    """One commit with all of `sent`. create_commit, since upload_folder may cut a push into several commits."""
    _check_id(repository, owned=True)
    api = HfApi(token=token)
    what = f"Cannot push to {repository}"
    if not (token or get_token()):
        raise HubError(f"{what}: no token for {api.endpoint}. {LOGIN}.")
    with _explained(what, repository, None, token):
        made = _make_repository(api, repository, private)
    hint = f" The new repository {repository} stays, empty unless the commit arrived." if made else ""
    with _explained(what, repository, revision, token, f" A push happens whole or not at all.{hint}"):
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        head = api.model_info(repository, revision=revision).sha
        operations = [CommitOperationAdd(name, content) for name, content in sorted(sent.items())]
        # The parent makes a commit that somebody else pushes meanwhile an error, instead of a mixture of both.
        commit = api.create_commit(
            repository, operations, commit_message=message, revision=revision, parent_commit=head
        )
    if tag is not None:
        with _explained(f"{what} the tag {tag}", repository, revision, token, " The files are there, the tag is not."):
            _tag(api, repository, tag, commit.oid)
    return Pushed(repository, commit.oid, f"{api.endpoint}/{repository}", commit.oid != head, left_out)


def _make_repository(api: HfApi, repository: str, private: bool) -> bool:
    """Whether the repository had to be made. Raises HubError where it is public and was asked for as private."""
    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        api.create_repo(repository, private=private)
        return True
    if private and not info.private:
        raise HubError(
            f"{repository} exists and is public: make it private in its settings, or push without asking for private."
        )
    return False


def _collect(repository: str, base: str, token: str | None) -> str:
    """Puts a base and an adapter into the collection of its adapters; the address of that. One call for each."""
    api, owner = HfApi(token=token), repository.split("/")[0]
    what = f"Cannot put {repository} into the collection of {base}'s adapters"
    with _explained(what, repository, None, token, " The files are there; push again to complete the collection."):
        private = bool(api.model_info(repository).private)
        collection = api.create_collection(f"Adapters of {base}", namespace=owner, private=private, exists_ok=True)
        for item in (base, repository):
            api.add_collection_item(collection.slug, item, "model", exists_ok=True)
    return collection.url


def _tag(api: HfApi, repository: str, tag: str, commit: str) -> None:
    """Names `commit`. Raises HubError where the tag names another."""
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repository).tags}
    if tags.get(tag, commit) != commit:
        raise HubError(
            f"{repository} has the tag {tag} on the commit {tags[tag]} already. The files are there, in the commit "
            f"{commit}: give it another tag."
        )
    if tag not in tags:
        api.create_tag(repository, tag=tag, revision=commit)


@contextmanager
def _explained(what: str, repository: str, revision: str | None, token: str | None, then: str = "") -> Iterator[None]:
    """Turns what huggingface_hub raises into a HubError: `what`, why, what to do, and `then`."""
    try:
        yield
    except HubError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError, SafetensorsParsingError) as error:
        raise HubError(f"{what}: {_reason(error, repository, revision, token)}{then}") from error


def _reason(error: Exception, repository: str, revision: str | None, token: str | None) -> str:
    """Why `error` happened and what to do. Says nothing of the token but whether there is one."""
    endpoint, anonymous = constants.ENDPOINT, not (token or get_token())
    cause = error.__cause__
    if isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and isinstance(cause, HTTPError):
        return _reason(cause, repository, revision, token)
    match error:
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set. Unset it to reach the Hub."
        case LocalEntryNotFoundError():
            at = "" if revision is None else f" at {revision}"
            return (
                f"it is not (wholly) in the cache{at}, and the Hub was not asked. Pull it once without HF_HUB_OFFLINE."
            )
        case GatedRepoError():
            return f"it is gated. Ask for access at {endpoint}/{repository}."
        case RepositoryNotFoundError():
            access = f"no token was given. {LOGIN}" if anonymous else "the token may not read it. Check the name"
            return f"{endpoint} has no such repository, or it is private and {access}."
        case RevisionNotFoundError():
            return f"it has no branch, tag or commit {revision!r}. {endpoint}/{repository}/tree/main lists them."
        case HfHubHTTPError():
            return _refusal(error, endpoint, anonymous)
        case HTTPError() | ConnectionError() | RuntimeError():
            xet = " A Hub that does not know Xet needs HF_HUB_DISABLE_XET=1." if "xet-write" in str(error) else ""
            return f"no connection to {endpoint}, or it broke off ({error}). Check HF_ENDPOINT and the network.{xet}"
        case _:
            return str(error)


def _refusal(error: HfHubHTTPError, endpoint: str, anonymous: bool) -> str:
    match error.response.status_code:
        case 401 if anonymous:
            return f"no token for {endpoint}. {LOGIN}."
        case 401:
            return f"{endpoint} does not know the token (expired, or of another Hub?). {LOGIN} anew."
        case 403:
            return "the token may not do this. Use one with write access, of an account that owns the repository."
        case 412:
            return "somebody else pushed meanwhile."
        case 409:
            return "it exists already, and the token may not see it. Choose another name."
        case status:
            return f"{endpoint} answered {status}: {error.server_message or error}."


def _check_id(name: str, owned: bool = False) -> None:
    """Raises HubError unless `name` is a Hub id (with its owner)."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HubError(f"{name!r} is neither a folder nor a Hub id such as user/name: {error}") from error
    if owned and "/" not in name:
        raise HubError(f"{name!r} lacks its owner: give user/{name}.")


def _check_pulled(repository: str, names: Iterable[str]) -> None:
    """Raises HubError unless a repository with these files is a model or an adapter in safetensors."""
    names = list(names)
    if not any(name.endswith(".safetensors") for name in names):
        if pickled := [*filter_repo_objects(names, allow_patterns=list(PICKLED))]:
            raise HubError(
                f"{repository} has its weights as pickle only ({', '.join(pickled)}), which runs code when it is read. "
                "Ask its owner for safetensors, or, if you trust it, load it with transformers or PEFT and "
                "save it anew (save_pretrained)."
            )
        raise HubError(f"{repository} is neither a model nor an adapter: it has no safetensors file.")


def _facts(folder: Path) -> AdapterFacts | None:
    try:
        return AdapterFacts.load(folder)
    except ValueError as error:
        raise HubError(str(error)) from error


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode()  # not read_text, which would change line ends
    except UnicodeDecodeError as error:
        raise HubError(f"{file} is not UTF-8 text: {error}") from error


def _json(file: Path) -> dict:
    try:
        content = json.loads(_read(file))
    except json.JSONDecodeError as error:
        raise HubError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise HubError(f"{file} is not a JSON object.")
    return content


def _dump(content: dict, indent: int = 1) -> bytes:
    return (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode()


def local_folder(source: str | Path, revision: str | None, token: str | None) -> Path:
    """`source` itself where it is a folder, else an adapter of that name in the package, else the snapshot of that Hub
    repository.
    """
    if Path(source).is_dir():
        return Path(source)
    if (packaged := packaged_adapters().get(str(source))) is not None:
        return packaged
    refuse_missing(source)
    return pull(str(source), revision=revision, token=token)
