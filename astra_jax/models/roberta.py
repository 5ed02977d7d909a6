"""RoBERTa and XLM-RoBERTa: a BERT whose places are counted from behind that of padding, and whose classifier has a
layer of its own."""

import dataclasses
from typing import ClassVar

from astra_jax.models.bert import Bert, BertConfig


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """The numbers of a RoBERTa under the names of Hugging Face's `RobertaConfig`.

    Attributes:
      pad_token_id: of padding; in the table of positions the row of this number is padding's, and tokens begin behind.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    head_activation: ClassVar[str | None] = "tanh"

    vocab_size: int = 50265
    pad_token_id: int = 1

    @property
    def position_offset(self) -> int:
        """The place of a text's first token in the table of positions."""
        return self.pad_token_id + 1


@dataclasses.dataclass(frozen=True)
class XLMRobertaConfig(RobertaConfig):
    """The numbers of an XLM-RoBERTa under the names of Hugging Face's `XLMRobertaConfig`."""

    vocab_size: int = 30522


class Roberta(Bert):
    """RoBERTa as a sentence encoder or a classifier. A token of padding that somebody writes in a text has a place as
    any other token."""
