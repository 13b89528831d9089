"""``offload eval tasks``: let a model answer questions about long documents."""

import argparse
from pathlib import Path

from tqdm import tqdm

from offload.cli_options import positive_int
from offload.errors import ConfigError
from offload.evals import prose, records
from offload.evals.contenders import EXACT, PROTOCOLS, find_contender
from offload.evals.exam import Examiner
from offload.evals.outputs import add_outputs, publish
from offload.evals.sheets import task_figures, task_sheets
from offload.evals.tasks import MakeCase, TaskRow, compare, make_cases
from offload.local_model import RECALL, load_local_model
from offload.recall_data import BOS_TOKEN_ID

_POLICIES = ("adaptive:0.004", "retroinfer:0.018")
_NOTES = (
    "`right`: mean score; `exact`: that of exact attention on the same questions; `points`: the "
    "difference, of a hundred. What the model cannot do at all is 0 in both. `same`: share of "
    "answers whose tokens are those of exact attention. `KL`: of the distribution of the first "
    "token of an answer from that of exact attention, in nats, where both had the same history.",
    "`read`, `tokens read`: what tokens of questions and answers (protocol A: of answers) read of "
    "all they could see, per layer and KV head, with sinks, window and what is not indexed yet. "
    "`error`, `p95`: of attention outputs, relative, as the runtime's own checks found it. Seconds "
    "are per document; building an index may count toward answers.",
)


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the kind."""
    parser = kinds.add_parser(
        "tasks",
        help="let a model answer questions about long documents",
        description="Asks a model about documents with each policy and with exact attention.",
    )
    text = f"a local folder, or {RECALL} (default), which is asked in records instead of English"
    parser.add_argument("--model", default=RECALL, metavar="PATH", help=text)
    text = "of the model (default: its own)"
    parser.add_argument("--dtype", default="auto", metavar="TYPE", help=text)
    text = "of the model (default: the first CUDA device, or the CPU)"
    parser.add_argument("--device", default="auto", metavar="DEVICE", help=text)
    text = f"for {RECALL}: {', '.join(records.TASKS)}; else: {', '.join(prose.TASKS)}"
    parser.add_argument("--tasks", nargs="+", metavar="T", help=f"{text} (default: all)")
    text = "lengths of documents (default: 4096)"
    parser.add_argument(
        "--tokens", type=positive_int, nargs="+", default=[4096], metavar="N", help=text
    )
    text = "POLICY, and after colons BUDGET (a share such as 0.01, or tokens), error=E, wait_us=T, "
    text += "codec=C; exact "
    text += f"always takes part (default: {' '.join(_POLICIES)})"
    parser.add_argument("--policies", nargs="+", default=_POLICIES, metavar="P", help=text)
    text = "answers to score per task and length (default: %(default)s)"
    parser.add_argument("--samples", type=positive_int, default=10, metavar="N", help=text)
    text = "documents to make for them, at most (default: %(default)s)"
    parser.add_argument("--documents", type=positive_int, default=4, metavar="N", help=text)
    text = "; ".join(f"{name}: {what}" for name, what in PROTOCOLS.items())
    parser.add_argument("--protocol", choices=PROTOCOLS, default="B", help=f"{text} (default: B)")
    text = "of the documents (default: %(default)s)"
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=text)
    text = "where the disk tier keeps its files (default: the user's cache folder)"
    parser.add_argument("--disk-path", type=Path, metavar="DIR", help=text)
    text = (
        "what the gpu and the cpu tier hold, as shares of the keys and values, such as 0.05 0.15;"
    )
    text += " the rest is on disk (default: what is free on this machine)"
    parser.add_argument("--shares", type=_share, nargs=2, metavar=("GPU", "CPU"), help=text)
    add_outputs(parser)


def run(args: argparse.Namespace) -> None:
    """Measure and publish.

    Raises
    ------
    ConfigError
        There is no such model, task, policy or budget, or a document cannot be so short.
    """
    makers = records.TASKS if args.model == RECALL else prose.TASKS
    tasks = args.tasks or list(makers)
    for task in tasks:
        if task not in makers:
            raise ConfigError(
                f"model {args.model!r} has no task {task!r}; it has: {', '.join(makers)}"
            )
    rows = measure(args, tasks)
    title = f"Answers of {'the recall model' if args.model == RECALL else args.model}"
    protocol = f"Protocol {args.protocol}: {PROTOCOLS[args.protocol]}."
    publish(args, title, (protocol, *_NOTES), rows, list(task_sheets(rows)), task_figures(rows))


def measure(args: argparse.Namespace, tasks: list[str]) -> list[TaskRow]:
    """Return one row per length, task and policy."""
    exact = find_contender(EXACT, args.protocol)
    policies = [name for name in args.policies if name != EXACT]
    contenders = [find_contender(name, args.protocol) for name in policies]
    model, tokenizer = load_local_model(args.model, args.dtype, args.device)
    first_token_id = BOS_TOKEN_ID if args.model == RECALL else None
    shares = None if args.shares is None else tuple(args.shares)
    examiner = Examiner(model, tokenizer, first_token_id, disk_path=args.disk_path, shares=shares)
    rows: list[TaskRow] = []
    with tqdm(total=0, unit="document") as bar:
        for num_tokens in args.tokens:
            for task in tasks:
                make = _maker(args.model, task, examiner)
                cases = make_cases(make, num_tokens, args.samples, args.documents, args.seed)
                bar.total += len(cases) * (1 + len(contenders))
                bar.set_description(f"{task}, {num_tokens} tokens")
                rows += compare(examiner, cases, num_tokens, exact, contenders, bar.update)
    return rows


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to 1")
    return share


def _maker(model: str, task: str, examiner: Examiner) -> MakeCase:
    if model == RECALL:
        return records.TASKS[task]
    make = prose.TASKS[task]
    return lambda num_tokens, num_samples, rng: make(num_tokens, num_samples, rng, examiner.count)
