"""Which split the name of a folder, a file or a Hub split says; one rule for every source.

A name is cut into words at whatever is no letter and where capitals begin:
`testA`, `test_seen` and `TRAIN-2017` have the words test, test, train. What
cannot be known is asked about, never taken for training data.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "valset", "dev", "devset", "eval", "evaluate", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
}
SPLIT = re.compile(r"[a-z][a-z0-9_]*")
SPLIT_COLUMNS = ("split", "splits", "set", "subset", "partition", "phase", "data set", "data_set", "dataset_split", "data_split")
"""Of a table, with a split for each sample, where its values say any; in letters of either case."""
NO_FOLDER = "."
"""How `--splits` calls images that lie in no folder."""


def split_name_words(name: str) -> list[str]:
    """Return the words of a name, in lower case: `valHard_2` has val and hard."""
    parts = re.findall(r"[^\W\d_]+", name)
    return [word.lower() for part in parts for word in re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", part).split()]


def splits_in_name(name: str) -> set[str]:
    """Return the splits that a name speaks of: none, one, or several, which leaves open what is meant."""
    return {SPLIT_WORDS[word] for word in split_name_words(name) if word in SPLIT_WORDS}


def names_of_file(path: str) -> list[str]:
    """Return what may name a file in `--splits`: its name, with and without ending and numbers, and its folders, the nearest first."""
    *folders, file = path.split("/")
    base = file.partition(".")[0]
    return [file, base, re.sub(r"([-_]?[0-9]+(-of-[0-9]+)?)*$", "", base), *reversed(folders)]


def is_split_name(name: str) -> bool:
    """Return whether a name says a split and nothing else but numbers: `Test`, `train2017`."""
    words = split_name_words(name)
    return len(words) == 1 and words[0] in SPLIT_WORDS


@dataclass(frozen=True)
class SplitChoice:
    """What `--splits` says: names of what is to be packed, each with its split; or that names say nothing."""

    names: tuple[tuple[str, str], ...] = ()
    ignored: bool = False
    """`--splits none`: names say nothing about splits, all samples are training data."""

    @property
    def is_given(self) -> bool:
        return self.ignored or bool(self.names)

    def find(self, names: Sequence[str]) -> tuple[str, str] | None:
        """Return the first of some names that was listed, as it was listed, and its split."""
        for name in names:
            for pattern, split in self.names:
                if name == pattern or fnmatchcase(name.lower(), pattern.lower()):
                    return pattern, split
        return None


ALL = SplitChoice()
"""What names say of themselves."""


def parse_splits(text: str) -> SplitChoice:
    """Return what the option `--splits` says.

    Args:
        text: `train,test`, `train,extra=train`, `none` or nothing.

    Raises:
        ValueError: a name that says no split and was given none, or a split that is no word.
    """
    if text.strip().lower() == "none":
        return SplitChoice(ignored=True)
    chosen = []
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        name, given, split = (part.strip() for part in entry.rpartition("=")) if "=" in entry else (entry, "", "")
        if not given:
            kinds = splits_in_name(name)
            if len(kinds) != 1:
                raise ValueError(f"--splits {name}: which split is that? Write {name}=train, {name}=val or {name}=test.")
            split = kinds.pop()
        if not name or not SPLIT.fullmatch(split):
            raise ValueError(f"--splits {entry}: a split is a word in small letters. Write NAME=train, NAME=val or NAME=test.")
        chosen.append((name, split))
    return SplitChoice(tuple(chosen))


TRAINING = "packs all as training data"
CLASSES = f"{TRAINING}, with the folders as classes"


def assign_splits(
    named: Mapping[str, Sequence[str]], choice: SplitChoice, where: str, *, known: bool = False, otherwise: str = TRAINING
) -> dict[str, str | None] | None:
    """Return the split of each item of a source, None for those that `--splits` leaves out; None where no name says any.

    Args:
        named: what messages call each item, and the names that may say its
            split, the one that decides first.
        choice: what `--splits` says.
        where: the source.
        known: the items are splits of their own, so that each must say which.
        otherwise: what `--splits none` does.

    Raises:
        ValueError: some say a split and others none, or one says several; or
            `--splits` names what is not there.
    """
    if choice.ignored:
        return None
    if choice.names:
        return _chosen(named, choice, where)
    said = {item: next((kinds for kinds in map(splits_in_name, names) if kinds), set()) for item, names in named.items()}
    if not known and not any(said.values()):
        return None
    if any(len(kinds) != 1 for kinds in said.values()):
        raise ValueError(ambiguity_message(where, said, otherwise))
    return {item: next(iter(kinds)) for item, kinds in said.items()}


def _chosen(named: Mapping[str, Sequence[str]], choice: SplitChoice, where: str) -> dict[str, str | None]:
    found = {item: choice.find(names) for item, names in named.items()}
    hits = {hit[0] for hit in found.values() if hit}
    for pattern, _ in choice.names:
        if pattern not in hits:
            raise ValueError(f"--splits {pattern!r}: {where} has {shorten_list(list(named))}. Name what is there.")
    return {item: hit[1] if hit else None for item, hit in found.items()}


def ambiguity_message(where: str, said: Mapping[str, set[str]], otherwise: str) -> str:
    """Return what to ask of names that do not say their splits alike, with the option that answers."""
    clear = [item for item, kinds in said.items() if len(kinds) == 1]
    unclear = [item for item, kinds in said.items() if len(kinds) != 1]
    known = f"{shorten_list([f'{item} ({next(iter(said[item]))})' for item in clear])} can be known, but " if clear else ""
    doubtful = shorten_list([f"{item} ({' and '.join(sorted(said[item]))})" if said[item] else item for item in unclear])
    example = shlex.quote(",".join([*clear[:2], f"{unclear[0]}=train"]))
    return (
        f"{where}: which splits are these? {known}{doubtful} {'cannot' if clear else 'cannot be known'}. Say which to pack, and as what, "
        f"with --splits, such as --splits {example} (those not named are left out); --splits none {otherwise}."
    )


def split_columns(names: Iterable[str]) -> list[str]:
    """Return the columns that may say a split of each sample, `split` first."""
    found = [name for name in names if name.strip().lower() in SPLIT_COLUMNS]
    return sorted(found, key=lambda name: SPLIT_COLUMNS.index(name.strip().lower()))


def check_rows(values: Iterable[object], split: str, where: str, column: str) -> None:
    """Raise a ValueError where a column of splits puts rows into another split than all rows of their file have."""
    words = {str(value) for value in values}
    others = sorted(word for word in words if splits_in_name(word) - {split})
    if others:
        raise ValueError(
            f"{where}: its column {column!r} says {shorten_list(others)} of some rows, and all would be packed as {split}. "
            f"Write a file for each split, or pack all as training data with --splits none."
        )


def shorten_list(items: Sequence[str], limit: int = 5) -> str:
    """Return the first few of a list, and how many more there are."""
    return ", ".join(items[:limit]) + (f" and {len(items) - limit:,} more" if len(items) > limit else "")


def split_folders(images: Sequence[str], choice: SplitChoice, where: str) -> tuple[list[str | None], list[str]]:
    """Return the split of each image, None for those left out, and the name of its class folder, empty where it is in none.

    Folders at the top, or below folders that hold all the images, are splits
    where all of them are named so. With names in `--splits` folders of these
    names are, at any depth.

    Args:
        images: their names below the source.
        choice: what `--splits` says.
        where: the source.

    Raises:
        ValueError: only some of the folders are named like splits, or folders inside of classes are.
    """
    paths = [tuple(name.split("/")[:-1]) for name in images]
    if choice.names:
        return _listed_folders(paths, choice, where)
    depth = _depth(paths)
    tops = [path[depth] if len(path) > depth else NO_FOLDER for path in paths]
    assigned = assign_splits({top: [top] for top in dict.fromkeys(tops)}, choice, where, otherwise=CLASSES)
    if assigned is not None:
        _refuse_classes(assigned, paths, depth, where)
        return [assigned[top] for top in tops], _class_folders([path[depth + 1 :] for path in paths])
    deep = dict.fromkeys("/".join(path[: i + 1]) for path in set(paths) for i, name in enumerate(path) if is_split_name(name))
    if deep and not choice.ignored:
        names = sorted({path.rpartition("/")[2] for path in deep})
        raise ValueError(
            f"{where}: folders inside of others are named like splits: {shorten_list(sorted(deep))}. Say --splits {','.join(names)} "
            "to take them as splits, or --splits none to pack all as training data."
        )
    return ["train"] * len(images), _class_folders(paths)


def _class_folders(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the class folder of each image: the outermost, but for those that hold all images and these in folders of their own."""
    outer = len(_common(paths))
    level = outer if all(len(path) > outer for path in paths) else 0
    return [path[level] if len(path) > level else "" for path in paths]


def _refuse_classes(assigned: Mapping[str, str | None], paths: Sequence[tuple[str, ...]], depth: int, where: str) -> None:
    """Raise a ValueError where names that say splits may say classes as well: `train_cat` and `train_dog`, with only images inside."""
    names = list(assigned)
    several = len(set(assigned.values())) < len(names) and not any(map(is_split_name, names))
    if several and all(len(path) == depth + 1 for path in paths):
        raise ValueError(
            f"{where}: are {shorten_list(names)} splits, or classes? Take them as splits with --splits {shlex.quote(','.join(names))}, "
            "or as classes of training data with --splits none."
        )


def _depth(paths: Sequence[tuple[str, ...]]) -> int:
    """Return how many folders deep splits are looked for: below those that hold all images, unless one of these is a split itself."""
    common = _common(paths)
    said = next((i for i, name in enumerate(common) if is_split_name(name)), None)
    if said is not None:
        return said
    return len(common) if any(splits_in_name(path[len(common)]) for path in set(paths) if len(path) > len(common)) else 0


def _common(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the folders that hold all images, from the outermost."""
    first, last = min(paths), max(paths)
    return next((first[:i] for i, name in enumerate(first) if i >= len(last) or name != last[i]), first)


def _listed_folders(paths: Sequence[tuple[str, ...]], choice: SplitChoice, where: str) -> tuple[list[str | None], list[str]]:
    """Take the nearest folder that was listed as an image's split; its class is the next folder inside, or the first one outside."""
    outer = len(_common(paths))
    said: dict[tuple[str, ...], tuple[str | None, tuple[str, ...]]] = {}
    hits = set[str]()
    for path in dict.fromkeys(paths):
        levels = [(i, choice.find([name])) for i, name in enumerate(path or (NO_FOLDER,))]
        level, hit = next(((i, hit) for i, hit in reversed(levels) if hit), (0, None))
        outside = next((other for _, other in levels if other and hit and other[1] != hit[1] == "train"), None)
        if outside:
            raise ValueError(
                f"--splits: {where} has {'/'.join(path)}, {outside[1]} by {outside[0]!r} and training data by {hit[0] if hit else ''!r}. "
                "Leave --splits out where the outer folders are the splits, or rename one of the two."
            )
        hits |= {hit[0]} if hit else set()
        said[path] = (hit[1], path[level + 1 :] or path[outer:level]) if hit else (None, ())
    for pattern, _ in choice.names:
        if pattern not in hits:
            tops = sorted({path[0] if path else NO_FOLDER for path in said})
            raise ValueError(f"--splits {pattern!r}: {where} has no such folder of images; it has {shorten_list(tops)}.")
    inside = [rest for split, rest in said.values() if split]
    class_of = dict(zip(inside, _class_folders(inside), strict=True))
    return [said[path][0] for path in paths], [class_of.get(said[path][1], "") for path in paths]
