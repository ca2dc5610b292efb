"""The fields of a request: what OpenAI's API names and we serve, what only its neutral value is taken of, and ours."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from ftp_lightning.serving.answers import Refused
from ftp_lightning.serving.options import MODES

NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "logprobs": ((False, 0), "log-probabilities are not served: a pruned prompt has none for its skipped tokens"),
    "top_logprobs": ((0,), "log-probabilities are not served: a pruned prompt has none for its skipped tokens"),
    "echo": ((False,), "echo is not served: put the prompt before the answer yourself"),
    "suffix": (("",), "suffix is not served: the model continues a prompt, it fills no gaps"),
    "best_of": ((1,), "best_of must be 1"),
    "n": ((1,), "n must be 1: send one request per answer"),
    "presence_penalty": ((0,), "presence_penalty must be 0"),
    "frequency_penalty": ((0,), "frequency_penalty must be 0"),
    "logit_bias": (({},), "logit_bias is not served"),
    "response_format": (({"type": "text"},), "response_format must be text: answers follow no grammar"),
    "tool_choice": (("none", "auto"), "tool_choice must be none or auto: answers follow no grammar"),
    "functions": (([],), "functions are not served; use tools"),
    "function_call": (("none", "auto"), "function_call is not served; use tools"),
    "modalities": ((["text"],), "modalities must be text"),
    "audio": ((), "audio is not served"),
    "prediction": ((), "prediction is not served"),
    "web_search_options": ((), "the model searches nothing"),
    "cache_implementation": (("dynamic",), "token skipping needs a dynamic key-value cache"),
    "reasoning_effort": ((), "reasoning_effort is not served: the chat template decides"),
    "verbosity": ((), "verbosity is not served"),
}
"""Field -> (the values that change nothing, what to say of others). None always changes nothing."""
PASSED_OVER = ("user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Fields that are about OpenAI's own service: taken, without effect."""
OURS = ("ftp_budget", "ftp_mode", "ftp_trace")
ALTERNATIVES = ("str", "list[int]", "list[TextPart]")
"""What pydantic puts into the place of a mistake where a value may be of several kinds."""


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=4)]
Strict = ConfigDict(extra="forbid", strict=True)


class StreamOptions(BaseModel):
    model_config = Strict
    include_usage: bool = False
    include_obfuscation: bool = False


class Fields(BaseModel):
    """What both kinds of completion take."""

    model_config = Strict

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[Stop, BeforeValidator(_one_or_more)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] = {}
    ftp_budget: float | None = Field(None, ge=0, lt=1, allow_inf_nan=False)
    ftp_mode: Literal["off", "auto", "always"] | None = None
    ftp_trace: bool = False


class Completion(Fields):
    """`/v1/completions`: a text, or its token ids."""

    prompt: str | list[int]


class TextPart(BaseModel):
    model_config = Strict
    type: Literal["text"]
    text: str


def _of_text(parts: Any) -> Any:
    """Refuse content parts of another kind by their name."""
    for part in parts if isinstance(parts, list) else ():
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise ValueError(f"only parts of type text are served, not {str(kind)[:50]!r}")
    return parts


class Message(BaseModel):
    """One turn of a chat; fields that an answer of ours carries back are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[TextPart] | None, BeforeValidator(_of_text)] = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def turn(self) -> dict[str, Any]:
        """What a chat template is given."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts or [])
        role = "system" if self.role == "developer" else self.role
        more = {"name": self.name, "tool_calls": self.tool_calls, "tool_call_id": self.tool_call_id}
        return {"role": role, "content": text} | {key: value for key, value in more.items() if value}


class Chat(Fields):
    """`/v1/chat/completions`: turns, and tools that the template may tell the model of."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] = []


Kind = TypeVar("Kind", bound=Fields)


def read(body: bytes, kind: type[Kind]) -> Kind:
    """The fields of a request's body. Refused (400) with a sentence for all that it cannot be."""
    try:
        given = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(given, dict):
        raise Refused(400, "the body must be a JSON object")
    tools = given.get("tool_choice") == "none"
    given = {name: value for name, value in given.items() if value is not None and name not in PASSED_OVER}
    for name in NEUTRAL.keys() & given.keys():
        values, sentence = NEUTRAL[name]
        if not any(_same(given[name], value) for value in values):
            raise Refused(400, sentence, param=name)
        del given[name]
    if tools:
        given.pop("tools", None)
    if kind is Completion and isinstance(given.get("prompt"), list):
        given["prompt"] = _single(given["prompt"])
    try:
        return kind.model_validate(_with_metadata(given))
    except ValidationError as error:
        raise _refusal(error) from None


def _same(given: Any, value: Any) -> bool:
    """Whether both are one JSON value: 0.0 is 0, but false is not."""
    return given == value and isinstance(given, bool) == isinstance(value, bool)


def _single(prompts: list) -> Any:
    """The only prompt of a list of them; a list of token ids is one prompt."""
    if not prompts or all(type(item) is int for item in prompts):
        return prompts
    if len(prompts) > 1:
        raise Refused(400, "prompt holds several prompts: send one request for each", param="prompt")
    return prompts[0]


def _with_metadata(given: dict[str, Any]) -> dict[str, Any]:
    """Our own fields may stand in `metadata`, whose values are texts."""
    metadata = given.get("metadata")
    if not isinstance(metadata, dict):
        return given
    for name in OURS:
        if name not in metadata:
            continue
        text = metadata[name]
        try:
            value = text if name == "ftp_mode" or not isinstance(text, str) else from_json(text, allow_inf_nan=False)
        except ValueError:
            value = text
        if given.setdefault(name, value) != value:
            raise Refused(400, f"{name} is given twice, with different values", param=name)
    texts = {name: value for name, value in metadata.items() if name not in OURS}
    return given | {"metadata": texts}


def _refusal(error: ValidationError) -> Refused:
    """The first mistake, with where it is; inside a list where a value may also be a text."""
    first, *others = error.errors(include_url=False, include_input=False)
    if first["loc"][-1] == "str":
        outside = first["loc"][:-1]
        inside = (e for e in others if e["loc"][: len(outside)] == outside and len(e["loc"]) > len(first["loc"]))
        first = next(inside, first)
    place = ".".join(str(part) for part in first["loc"] if str(part) not in ALTERNATIVES)
    said = first["msg"].removeprefix("Value error, ").split(" or instance of ")[0].replace("dictionary", "object")
    if first["type"] == "extra_forbidden":
        return Refused(400, f"there is no field {place!r}", param=place)
    if first["type"] == "missing":
        return Refused(400, f"{place} is missing", param=place)
    if place == "ftp_mode":
        return Refused(400, f"ftp_mode must be one of {', '.join(MODES)}", param=place)
    return Refused(400, f"{place}: {said[:1].lower()}{said[1:200]}", param=place)
