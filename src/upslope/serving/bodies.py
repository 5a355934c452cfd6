"""What may be sent. A field that is not listed is refused by name; null means that a field was not given.

Names and ranges are OpenAI's; those that OpenAI does not have are vLLM's.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Items = Field(fail_fast=True)
"""A list of which the first wrong item is told; the others are not even looked at."""
Token = Annotated[int, Field(ge=0, lt=2**31)]


def _kind_of_prompt(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else ""
    if not isinstance(value, list):
        return "(text)"
    return "(texts)" if isinstance(first, str) else "(token lists)" if isinstance(first, list) else "(tokens)"


Prompt = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[str], Items, Tag("(texts)")]
    | Annotated[list[Token], Items, Tag("(tokens)")]
    | Annotated[list[Annotated[list[Token], Items]], Items, Tag("(token lists)")],
    Discriminator(_kind_of_prompt),
]
"""A text, texts, tokens, or lists of tokens: what the first item is, so that no other kind is tried."""


class Strict(BaseModel):
    """A JSON object of which every field is known and has the right type, without any conversion."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_surplus_is_enough(cls, data: Any) -> Any:
        """Of the fields that are not known only the first, so that refusing a hundred thousand is quick."""
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        surplus = next((key for key in data if key not in known), None)
        return {key: value for key, value in data.items() if key in known or key == surplus}


class Body(Strict):
    """A Strict object in which null means that a field was not given."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class ModelBody(Body):
    """What is said to one model; the first one where none is named."""

    model: str | None = None


class UserBody(ModelBody):
    """What OpenAI's clients may send under a user's name."""

    user: str | None = Field(None, description="Accepted and not used: nothing is kept of who asked.")
