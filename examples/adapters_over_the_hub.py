"""A base and its adapters to a Hub, and back: pushed by one process, pulled by id into an empty cache, swapped, judged.

    python examples/adapters_over_the_hub.py BASE telephony=FOLDER noisy=FOLDER \
        --trials FILE --folder DIR --noise NOISE_DIR --owner ME

goes to the Hub that HF_ENDPOINT names (or huggingface.co) with the token you logged in with. With --local it starts a
small one on this machine first and uses that. The adapters' names are the domains that the trials' audio is brought
into.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

LOCAL_HUB = Path(__file__).with_name("local_hub.py")


def main():
    """Parses the command line, with a local Hub if asked, and goes there and back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a saved model's folder, or a model that comes with the package")
    parser.add_argument("adapters", nargs="+", metavar="DOMAIN=FOLDER")
    parser.add_argument("--trials", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="what the trials' paths are relative to")
    parser.add_argument("--noise", type=Path, help="noise of the domain noisy")
    parser.add_argument("--owner", required=True, help="user or organisation")
    parser.add_argument("--local", action="store_true", help="start a Hub on this machine, for this run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        if not arguments.local:
            there_and_back(arguments, cache)
            return
        with local_hub(arguments.owner) as url:
            os.environ |= {"HF_ENDPOINT": url, "HF_TOKEN": "local", "HF_HUB_DISABLE_XET": "1", "HF_HUB_CACHE": cache}
            there_and_back(arguments, cache)


@contextmanager
def local_hub(user: str):
    """The URL of a Hub in a process of its own, which ends with the block."""
    command = [sys.executable, str(LOCAL_HUB), "--token", "local", "--user", user]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


def there_and_back(arguments: argparse.Namespace, cache: str):
    """Pushes everything, then works from the ids alone."""
    # Only now: huggingface_hub reads HF_ENDPOINT when it is imported.
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    from mrl_redimnet.adapters.bank import AdapterBank
    from mrl_redimnet.adapters.hub import default_repository, list_adapters, push_adapter, push_base
    from mrl_redimnet.audio.domains import make_domain
    from mrl_redimnet.evaluation.results import evaluate_trials, format_table
    from mrl_redimnet.scoring.trials import read_trials

    disable_progress_bar()  # of small files, between the lines that count
    disable_progress_bars()
    folder = Path(arguments.base)
    base = f"{arguments.owner}/redimnet-mrl-{folder.resolve().parent.name if folder.is_dir() else arguments.base}"
    print(f"{push_base(arguments.base, base).url}: pushed")
    for pair in arguments.adapters:
        domain, _, folder = pair.partition("=")
        pushed = push_adapter(folder, default_repository(base, domain), base=base)
        print(f"{pushed.url}: pushed, {(Path(folder) / 'adapter_model.safetensors').stat().st_size:,} bytes")

    found = {row.domain: row.repository for row in list_adapters(base)}
    print(f"Adapters of {base} on the Hub: {', '.join(found.values())}")
    bank = AdapterBank.load(base, found)
    trials = read_trials(arguments.trials)
    for condition in ("clean", *found):
        noise = {"noise": arguments.noise} if condition == "noisy" else {}
        tables = {}
        for adapter in (None, *found):
            bank.set_adapter(adapter)
            domain = make_domain(condition, **noise)
            tables[f"{adapter or 'base'}"] = evaluate_trials(bank.model, trials, arguments.folder, domain=domain)
        print(f"\n{condition} speech\n{format_table(tables)}")


if __name__ == "__main__":
    main()
