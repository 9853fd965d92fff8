"""Sources of prompts, files and tasks of reasoning-gym, alone or as weighted members of one mixture."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from megatron_troll.config.node import Files, Node, Positive, PositiveFloat, Slot, nearest
from megatron_troll.config.rewards import RewardConfig

Schema = Literal["auto", "dapo", "gsm8k", "livecodebench", "math", "messages", "nemo_rl", "slime"]
AnswerForm = Literal["text", "gsm8k", "boxed", "none"]
Scalar = str | int | float | bool
Wanted = Scalar | Annotated[tuple[Scalar, ...], Field(min_length=1)]
LONGEST_WORD = 64
LEVELS = 64
Level = Annotated[int, Field(ge=0, lt=LEVELS)]


def _metric_word(name: str) -> str:
    """The name, if it can be the last part of a metric's. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or len(name) > LONGEST_WORD:
        raise ValueError(
            f"got {name!r:.100}, expected a name for metrics: at most {LONGEST_WORD} letters, digits, and "
            "inside it _ . -"
        )
    return name


MetricWord = Annotated[str, AfterValidator(_metric_word)]


class Curriculum(Node):
    """Levels of difficulty, those of the data set's own curriculum, that rise with success in training. A
    level includes the easier ones where the set's ranges do."""

    success: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.75, description="mean success over `window` prompts from which on the level rises"
    )
    window: Positive = Field(default=256, description="prompts of the source, the last ones of its level")
    first: Level = Field(default=0, description="level to begin with")
    last: Level | None = Field(default=None, description="level to end with; default: the set's highest")

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.last is not None and self.last < self.first:
            raise ValueError(f"last={self.last} is below first={self.first}")
        return self


class Gym(Slot):
    """Tasks of reasoning-gym: a data set by name, the set's own options beside it. The name alone is short
    for {name: SET}."""

    name: str = Field(description="data set of reasoning-gym")
    size: Annotated[int, Field(ge=1, le=2**18)] = Field(
        default=1000, description="items made; those with the same text count once"
    )
    seed: Annotated[int, Field(ge=0, lt=128)] = Field(
        default=0, description="of the items: another one, other items"
    )
    curriculum: Curriculum | None = Field(default=None, description="default: as hard as the options say")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


Column = Annotated[str, Field(min_length=1)]


class Columns(Node):
    """Columns of files by name, those inside others by dots and numbers: `reward_model.ground_truth`,
    `turns.0.content`, `turns.-1.content`. What is not named is that of the schema."""

    prompt: Column | None = Field(default=None, description="a text, or a chat of turns")
    answer: Column | None = Field(default=None, description="the right answer, see `answer_form`")
    id: Column | None = Field(
        default=None, description="name of the prompt; default: of the schema, or the hash of its text"
    )

    def over(self, other: "Columns") -> "Columns":
        """These columns, and those of `other` where these name none."""
        return Columns(**(other.model_dump() | self.model_dump(exclude_none=True)))


class Origin(Node):
    """The origin of the prompts of one source, and what is added to them."""

    files: Files | None = Field(default=None, description="prompts: JSONL, JSON, Parquet or Arrow")
    gym: Gym | None = None
    schema_: Schema | None = Field(
        default="auto", alias="schema", description="auto: told by the first row of each file"
    )
    columns: Columns = Columns()
    answer_form: AnswerForm | None = Field(
        default=None,
        description="the answer in its column: text: all of it; gsm8k: what follows the last ####, without "
        "commas; boxed: the content of the last \\boxed{}; none: the rows have no answer, the reward needs "
        "none; default: that of the schema, text for `columns.answer`",
    )
    where: dict[Column, Wanted] = Field(
        default={},
        description="only rows with this value, or one of these, in this column, such as {ability: math}",
    )
    instruction: str | None = Field(
        default=None,
        description="text appended to the last turn of every prompt after a blank line, or the turn's new "
        "text with {question} in the place of the old one; default: of `gym`, to write the answer between "
        "<answer> and </answer>",
    )
    system: str | None = Field(
        default=None,
        description='text of a system turn before every prompt, none of which may have its own; "": none',
    )

    @property
    def origins(self) -> dict[str, object]:
        """The values of those keys, of which exactly one must be set, that are."""
        return {key: value for key in self.origin_keys() if (value := getattr(self, key))}

    @classmethod
    def origin_keys(cls) -> tuple[str, ...]:
        return "files", "gym"

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if len(self.origins) != 1:
            wanted = " or ".join(self.origin_keys())
            got = " and ".join(self.origins) or "none"
            raise ValueError(f"got {got}, expected exactly one of the keys {wanted}")
        return self

    @model_validator(mode="after")
    def _columns_of_files(self) -> Self:
        given = self.of_rows
        if self.gym is not None and given:
            raise ValueError(f"got {' and '.join(given)} beside gym: they are for files")
        if self.answer_form == "none" and self.columns.answer is not None:
            raise ValueError(f"got answer_form=none and columns.answer={self.columns.answer}: leave one out")
        return self

    @property
    def names_columns(self) -> bool:
        """Whether prompt and answer are in columns that are named, and no schema is."""
        return self.schema_ in (None, "auto") and self.columns.prompt is not None

    def check_columns(self) -> None:
        """Raise ValueError if one of prompt and answer is named, and no schema tells the other."""
        columns = self.columns
        both = columns.prompt is not None and (columns.answer is not None or self.answer_form == "none")
        one = columns.prompt is not None or columns.answer is not None
        if self.schema_ in (None, "auto") and one and not both:
            named, other = ("prompt", "answer") if columns.prompt else ("answer", "prompt")
            what = f"columns.{named}={getattr(columns, named)} alone"
            none = ", or answer_form=none for a reward that needs none" if other == "answer" else ""
            raise ValueError(f"got {what}: name columns.{other} too{none}, or the schema")

    @property
    def of_rows(self) -> list[str]:
        """The keys that say how rows of files are read, as far as they are set."""
        values = {"columns": self.columns != Columns(), "answer_form": self.answer_form, "where": self.where}
        return [key for key, value in values.items() if value]


class Reading(Node):
    """The handling of rows that are not prompts or are too long."""

    malformed: Literal["error", "skip"] = Field(
        default="error", description="a line that is not a prompt: stop, or skip and count it"
    )
    max_prompt_tokens: Positive = Field(
        default=1024, description="tokens of a prompt, chat template included"
    )
    overlong_prompts: Literal["error", "skip"] = Field(
        default="error", description="a longer prompt: stop, or skip and count it"
    )


class Source(Origin):
    """One source of a mixture, named by its key."""

    weight: PositiveFloat = Field(
        default=1.0, description="share of the prompts, relative to the other sources"
    )
    schema_: Schema | None = Field(
        default=None,
        alias="schema",
        description="default: data.schema; a source with its own takes over no `columns`, `answer_form` or "
        "`where` of data",
    )
    reward: RewardConfig | None = Field(
        default=None,
        description="judges its answers; default: of `gym`, the set's scorer, otherwise `reward`",
    )


class Data(Origin, Reading):
    """The prompts of training, and those held out from it: one source, or several."""

    sources: dict[MetricWord, Source] = Field(default={})
    held_out: Positive | Files | dict[MetricWord, Positive | Files] = Field(
        default=1024,
        description="a count split from the training prompts, of several sources by weight; or files; or "
        "either by the name of its source",
    )
    shuffle: bool = Field(
        default=True, description="a new order each epoch, fixed by `seed`; false: file order"
    )
    template_arguments: dict[str, str | int | float | bool] = Field(
        default={},
        description="arguments of the chat template, such as enable_thinking: false; for training, its "
        "evaluations and `mtroll sft`",
    )

    @classmethod
    def origin_keys(cls) -> tuple[str, ...]:
        return (*super().origin_keys(), "sources")

    @model_validator(mode="after")
    def _held_out_by_source(self) -> Self:
        held_out = self.held_out
        if isinstance(held_out, tuple) and len(self.sources) > 1:
            raise ValueError(
                "held_out: files do not say of which source they are: give them by its name, "
                f"{{{min(self.sources)}: [...]}}"
            )
        if isinstance(held_out, dict):
            if not held_out:
                raise ValueError("held_out: got {}, expected one source or more: a run is evaluated on them")
            for name in held_out.keys() - self.sources.keys():
                raise ValueError(f"held_out.{name}: no such source; {nearest(name, self.sources)}")
        for name, source in self.mixture.items():
            try:
                source.check_columns()
            except ValueError as error:
                raise ValueError(f"sources.{name}: {error}" if name else str(error)) from error
            of = held_out.get(name) if isinstance(held_out, dict) else held_out
            if source.gym is not None and isinstance(of, tuple):
                raise ValueError(
                    f"held_out: the tasks of {name or 'gym'} are made: give their number, not files"
                )
        return self

    @property
    def mixture(self) -> dict[str, Source]:
        """The sources by name, in the order of their names, with what they take over from `data`; the one
        source of the short form has the name ""."""
        if not self.sources:
            keys = ("instruction", "system", "columns", "answer_form", "where")
            own = self.origins | {key: getattr(self, key) for key in keys} | {"schema": self.schema_}
            return {"": Source.model_validate(own)}
        return {name: self._completed(source) for name, source in sorted(self.sources.items())}

    def _completed(self, source: Source) -> Source:
        """A source with what it takes over."""
        over: dict[str, object] = {
            "schema_": source.schema_ or self.schema_,
            "instruction": self.instruction if source.instruction is None else source.instruction,
            "system": self.system if source.system is None else source.system,
        }
        if source.schema_ is None:
            over["columns"] = source.columns.over(self.columns)
            over["answer_form"] = source.answer_form or self.answer_form
            over["where"] = source.where or self.where
        return source.model_copy(update=over)
