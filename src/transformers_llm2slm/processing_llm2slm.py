"""Processor: text to what the model takes, with one tokenizer or two."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, get_args

import torch
from transformers import AutoConfig, BatchEncoding, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import CHAT_TEMPLATE_FILE, PROCESSOR_NAME

from .alignment import align_tokens
from .composition import different_tokenizers, load_tokenizer, tokenizers_equal
from .configuration_llm2slm import (
    FUSIONS,
    SLMEncoder,
    check_choice,
    decoder_text_config,
    encoder_text_config,
    special_token_id,
)
from .loading import HUB_ARGUMENTS, llm_position_limit, location, take_prefixed
from .reference import pin_revision
from .remote_code import PROCESSOR_AUTO_MAP, IncludesCode, code_included
from .structure import position_limit
from .validation import check_processor

# Subfolders of the tokenizers where there are two. Where there is one, it lies at the root, as in any other repository.
SLM_TOKENIZER_SUBFOLDER = "slm_tokenizer"
LLM_TOKENIZER_SUBFOLDER = "llm_tokenizer"


class LLM2SLMProcessor(IncludesCode, ProcessorMixin):
    r"""
    Turns prompts into the LLM's tokens (and the SLM's, for `fusion="align"`) and responses into the SLM's.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The SLM's tokenizer: labels, decoding, eos, pad.
        llm_tokenizer (`PreTrainedTokenizerBase`, *optional*): The LLM's tokenizer; `None` if it is the same.
        fusion (`str`, defaults to `"add"`): The model's fusion, which decides the token views of a prompt.
        slm_is_encoder_decoder (`bool`, defaults to `True`): The kind of the SLM, which decides the special tokens of a
            response.
        decoder_start_token_id (`int`, *optional*): The token that an encoder-decoder SLM starts from; a response that
            its tokenizer begins with the same token is left without it.
        max_prompt_length (`int`, *optional*): Tokens that the LLM takes; what `truncation=True` cuts to.
        slm_max_prompt_length (`int`, *optional*): Tokens that the SLM takes.
        chat_template (`str`, *optional*): Template for `apply_chat_template`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        llm_tokenizer: PreTrainedTokenizerBase | None = None,
        fusion: str = "add",
        slm_is_encoder_decoder: bool = True,
        decoder_start_token_id: int | None = None,
        max_prompt_length: int | None = None,
        slm_max_prompt_length: int | None = None,
        chat_template: str | None = None,
    ):
        check_choice("fusion", fusion, FUSIONS)
        llm_tokenizer = tokenizer if llm_tokenizer is None else llm_tokenizer
        self.shared_tokenizer = tokenizers_equal(llm_tokenizer, tokenizer)
        if fusion in ("add", "kv") and not self.shared_tokenizer:
            raise ValueError(different_tokenizers(llm_tokenizer, tokenizer, fusion))
        if fusion == "align":
            for name, part in (("LLM", llm_tokenizer), ("SLM", tokenizer)):
                if not part.is_fast:
                    raise ValueError(
                        f'`fusion="align"` needs tokenizers that give character offsets; the {name}\'s, '
                        f'{type(part).__name__}, does not. Use a fast tokenizer, or `fusion="replace"` or `"llm-embed"`.'
                    )
        for part in (tokenizer, llm_tokenizer):
            if part.pad_token is None:  # padding is masked, so any token of the vocabulary will do
                part.pad_token = part.eos_token or part.unk_token
        self.fusion = fusion
        self.slm_is_encoder_decoder = slm_is_encoder_decoder
        self.decoder_start_token_id = decoder_start_token_id
        self.max_prompt_length = max_prompt_length
        self.slm_max_prompt_length = slm_max_prompt_length
        super().__init__(tokenizer, llm_tokenizer, chat_template=chat_template or llm_tokenizer.chat_template)

    # Loading and saving ----------------------------------------------------------------------------------------------
    @classmethod
    def from_llm_slm_pretrained(
        cls,
        llm: str | os.PathLike,
        slm: str | os.PathLike | None = None,
        fusion: str | None = None,
        slm_encoder: str = "keep",
        **kwargs: Any,
    ) -> LLM2SLMProcessor:
        """
        The processor for a model of this LLM and this SLM.

        Args:
            llm, slm (`str` or `os.PathLike`): Hub ids or local folders; `slm=None` if the SLM is cut from the LLM.
            fusion (`str`, *optional*): The model's fusion; by default `"add"` where the tokenizers are equal and
                `"align"` where not, or `"replace"` if the SLM's encoder is skipped, as for the model.
            slm_encoder (`str`, defaults to `"keep"`): The model's, too: an encoder that is skipped limits no prompt.
            kwargs: `token`, `cache_dir`, `local_files_only`, `force_download`, `trust_remote_code`, and the same and
                `revision`, `subfolder` with the prefix `llm_` or `slm_` for one of the two.

        Raises:
            ValueError: for `fusion="add"` or `"kv"` with two different tokenizers.
        """
        check_choice("slm_encoder", slm_encoder, get_args(SLMEncoder))
        if slm_encoder == "skip":
            fusion = fusion or "replace"
        llm, slm = os.fspath(llm), None if slm is None else os.fspath(slm)
        shared = {key: kwargs.pop(key) for key in (*HUB_ARGUMENTS, "trust_remote_code") if key in kwargs}
        llm_kwargs, slm_kwargs = shared | take_prefixed(kwargs, "llm_"), shared | take_prefixed(kwargs, "slm_")
        if kwargs:
            raise TypeError(f"`from_llm_slm_pretrained` got unknown argument(s) {', '.join(sorted(kwargs))}.")
        if slm is None or (slm, location(slm_kwargs)) == (llm, location(llm_kwargs)):
            slm, slm_kwargs = llm, llm_kwargs
        for source, part in ((llm, llm_kwargs), (slm, slm_kwargs)):
            pin_revision(source, part)
        llm_config, slm_config = (
            AutoConfig.from_pretrained(source, **location(part, "trust_remote_code"))
            for source, part in ((llm, llm_kwargs), (slm, slm_kwargs))
        )
        llm_tokenizer = load_tokenizer(llm, llm_kwargs)
        tokenizer = llm_tokenizer if slm_kwargs is llm_kwargs else load_tokenizer(slm, slm_kwargs)
        if tokenizers_equal(llm_tokenizer, tokenizer):
            llm_tokenizer, fusion = tokenizer, fusion or "add"
        limits = [llm_position_limit(llm_config), llm_tokenizer.model_max_length]
        slm_limit = None if slm_encoder == "skip" else position_limit(encoder_text_config(slm_config))
        if fusion not in (None, "align"):  # the SLM's prompt is then as long as the LLM's
            limits.append(slm_limit)
        limits = [limit for limit in limits if limit is not None and limit < 1_000_000]
        start = special_token_id(slm_config, "decoder_start_token_id")  # 0 in T5
        if start is None:
            start = special_token_id(decoder_text_config(slm_config), "bos_token_id")
        return cls(
            tokenizer,
            llm_tokenizer,
            fusion=fusion or "align",
            slm_is_encoder_decoder=slm_config.is_encoder_decoder,
            decoder_start_token_id=start,
            max_prompt_length=min(limits, default=None),
            slm_max_prompt_length=slm_limit,
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        include_code: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """
        Save settings and tokenizers. One tokenizer lies at the root, where `AutoTokenizer` finds it; two lie in
        `slm_tokenizer/` and `llm_tokenizer/`, so that neither is taken for the only one.

        Args:
            save_directory (`str` or `os.PathLike`): Where to.
            push_to_hub (`bool`, defaults to `False`): Upload the same files too, to `repo_id` (by default the name of
                the folder in your namespace), with the arguments of `push_to_hub` in `kwargs`.
            include_code (`bool`, defaults to `False`): Save a copy of the code too, see [`IncludesCode`].
        """
        os.makedirs(save_directory, exist_ok=True)
        if self.shared_tokenizer:
            self.tokenizer.save_pretrained(save_directory)
        else:
            self.tokenizer.save_pretrained(os.path.join(save_directory, SLM_TOKENIZER_SUBFOLDER))
            self.llm_tokenizer.save_pretrained(os.path.join(save_directory, LLM_TOKENIZER_SUBFOLDER))
        if isinstance(self.chat_template, str):
            with open(os.path.join(save_directory, CHAT_TEMPLATE_FILE), "w", encoding="utf-8") as template:
                template.write(self.chat_template)
        file = os.path.join(save_directory, PROCESSOR_NAME)
        with code_included(self, include_code):
            self.to_json_file(file)
            self._save_code_and_push(save_directory, push_to_hub, **kwargs)
        return [file]

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict() | {"shared_tokenizer": self.shared_tokenizer}
        return output | {"auto_map": PROCESSOR_AUTO_MAP} if "auto_map" in output else output

    @classmethod
    def _get_arguments_from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        processor_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[PreTrainedTokenizerBase]:
        if not processor_dict or "fusion" not in processor_dict:
            raise ValueError(
                f"{os.fspath(pretrained_model_name_or_path)!r} has no `{PROCESSOR_NAME}` of an {cls.__name__}, so nothing "
                "says which tokens LLM and SLM get. Save the processor beside the model, `processor.save_pretrained(...)`, "
                f"or make it anew: `{cls.__name__}.from_llm_slm_pretrained(llm, slm)`."
            )
        check_processor(processor_dict)
        root = kwargs.pop("subfolder", "")
        kwargs = location(kwargs, "trust_remote_code")
        folders = ["", ""]
        if not processor_dict.get("shared_tokenizer", True):
            folders = [SLM_TOKENIZER_SUBFOLDER, LLM_TOKENIZER_SUBFOLDER]
        tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        for folder in folders:
            if folder not in tokenizers:
                subfolder = "/".join(part for part in (root, folder) if part)
                # A tokenizer names its class itself. Without a config, one would be looked for in its subfolder.
                tokenizers[folder] = load_tokenizer(
                    os.fspath(pretrained_model_name_or_path),
                    kwargs | {"subfolder": subfolder, "config": PreTrainedConfig()},
                )
        return [tokenizers[folder] for folder in folders]

    # Text to tokens --------------------------------------------------------------------------------------------------
    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        tokenize: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | BatchEncoding:
        """
        A conversation as a prompt in the LLM's chat format, with the LLM's special tokens.

        Args:
            conversation (`list[dict]` or a list of these): Messages with `"role"` and `"content"`.
            chat_template (`str`, *optional*): Defaults to the processor's, which defaults to the LLM's tokenizer's.
            tokenize (`bool`, defaults to `False`): Give the processor's columns in place of text.
            processor_kwargs (`Mapping`, *optional*): With `tokenize=True`, arguments for calling the processor;
                `padding`, `truncation`, `max_length` and `return_tensors` may be given directly.
            kwargs: As for the tokenizer's `apply_chat_template` (`add_generation_prompt`, `tools` ...).
        """
        names = ("padding", "truncation", "max_length", "return_tensors")
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        kwargs.pop("return_dict", None)  # one column is no prompt: with `tokenize=True` it is always all of them
        text = self.llm_tokenizer.apply_chat_template(
            conversation, chat_template=chat_template or self.chat_template, tokenize=False, **kwargs
        )
        if not tokenize:
            return text
        return self(text, **{"add_special_tokens": False} | given | dict(processor_kwargs or {}))

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask"]
        return names + (["slm_input_ids", "slm_attention_mask", "alignment"] if self.fusion == "align" else [])

    def __call__(
        self,
        text: str | Sequence[Any] | None = None,
        text_target: str | Sequence[Any] | None = None,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        max_target_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
    ) -> BatchEncoding:
        """
        Tokenize prompts, responses, or both.

        Args:
            text (`str` or `Sequence[str]`, *optional*): Prompts. A conversation (a list of messages with `"role"` and
                `"content"`) is a prompt too: the chat template makes its text, special tokens included.
            text_target (`str` or `Sequence[str]`, *optional*): Responses, or the assistant's messages that hold them.
            padding (`bool` or `str`, defaults to `False`): `True` or `"longest"` pads to the longest row, `"max_length"`
                to `max_length` and `max_target_length`; on each tokenizer's padding side (labels on the right).
            truncation (`bool`, defaults to `False`): Cut prompts to `max_length`, responses to `max_target_length`. For
                `fusion="align"` the SLM gets no more characters than the LLM has read, cut to what it takes (with
                `padding="max_length"`, so that shapes are static, to `max_length` of its own tokens too).
            max_length (`int`, *optional*): Length of a prompt in the LLM's tokens; by default what the models take.
            max_target_length (`int`, *optional*): Length of a response in the SLM's tokens, its end token included.
            return_tensors (`str`, *optional*): `"pt"` for tensors; lists by default.
            add_special_tokens (`bool`, defaults to `True`): Whether the tokenizers add theirs to the prompt; `False` for
                text that a chat template has made.

        Returns:
            `BatchEncoding` with `input_ids` and `attention_mask` of shape `(batch_size, prompt_length)`; for
            `fusion="align"` also `slm_input_ids`, `slm_attention_mask` and `alignment` of shape `(batch_size,
            slm_prompt_length)`; with `text_target` also `labels` of shape `(batch_size, response_length)`, padded with
            -100.

        Raises:
            ValueError: for an empty batch, an empty prompt, or one that is too long and not to be truncated, or numbers of prompts and
                responses that differ.
        """
        if text is None and text_target is None:
            raise ValueError("Give the processor prompts as `text`, responses as `text_target`, or both.")
        for name, value in (("text", text), ("text_target", text_target)):
            if isinstance(value, Mapping):
                raise ValueError(
                    f"`{name}` must be text or a list of texts, got {type(value).__name__} with the keys {', '.join(map(str, value))}. "
                    f'Pass its column: `processor({name}=rows["..."])`.'
                )
        if not isinstance(truncation, bool):
            raise ValueError(f"`truncation` must be True or False, got {truncation!r}.")
        single = _is_single(text if text is not None else text_target)
        columns: dict[str, list[list[int]]] = {}
        if text is not None:
            prompts = _some_texts("text", text)
            if all(map(is_conversation, prompts)):
                prompts = list(self.apply_chat_template(prompts, add_generation_prompt=True))
                add_special_tokens = False
            cut_to = self._lengths(max_length, static=padding == "max_length")
            columns |= self._prompt_columns(prompts, truncation, *cut_to, add_special_tokens)
        if text_target is not None:
            responses = _some_texts("text_target", text_target)
            columns["labels"] = self.response_ids(
                list(map(response_text, responses)), max_target_length if truncation else None
            )
            if len({len(rows) for rows in columns.values()}) > 1:
                raise ValueError(
                    f"Each prompt needs one response, got {len(columns['input_ids'])} and {len(responses)} of them."
                )
        batch = self.pad(columns, padding, max_length, max_target_length, return_tensors)
        return (
            BatchEncoding({name: rows[0] for name, rows in batch.items()}) if single and not return_tensors else batch
        )

    def pad(
        self,
        encoded_inputs: Mapping[str, Sequence[Sequence[int]]] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        max_target_length: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """
        Make a batch of rows that this processor has tokenized before.

        Args:
            encoded_inputs (`Mapping[str, Sequence]` or `Sequence[Mapping]`): The columns that it returned, or rows of them,
                of which other columns are left out.
            padding, max_length, max_target_length, return_tensors: As for `__call__`. Nothing is cut.

        Returns:
            `BatchEncoding`: As from `__call__`, with the columns that a model takes.

        Raises:
            ValueError: for other options than `__call__` takes, rows that lack a column, or rows that make no tensor as they
                are of unequal length.
        """
        if padding not in (True, False, "longest", "max_length"):
            raise ValueError(f'`padding` must be True, False, "longest" or "max_length", got {padding!r}.')
        if return_tensors not in (None, "pt"):
            raise ValueError(f'`return_tensors` must be None or "pt", got {return_tensors!r}.')
        columns: dict[str, Any] = (
            dict(encoded_inputs) if isinstance(encoded_inputs, Mapping) else self._columns(encoded_inputs)
        )
        static = padding == "max_length"
        max_length, slm_max_length = self._lengths(max_length, static)
        limits = dict.fromkeys(columns, slm_max_length) | {"labels": max_target_length}
        limits |= {"input_ids": max_length, "attention_mask": max_length}
        if padding or return_tensors is not None:
            columns = {
                name: self._padded(name, rows, bool(padding), limits[name] if static else None)
                for name, rows in columns.items()
            }
        if return_tensors is not None:
            columns = {name: torch.tensor(rows, dtype=torch.long) for name, rows in columns.items()}
        return BatchEncoding(columns)

    def _columns(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[int]]]:
        columns: dict[str, list[list[int]]] = {}
        for name in (*self.model_input_names, *(["labels"] if any("labels" in row for row in rows) else [])):
            for index, row in enumerate(rows):
                if row.get(name) is None:
                    raise ValueError(
                        f"Row {index} has no {name!r}; its columns are {sorted(row)}. Tokenize rows with this processor: "
                        "`processor(text=prompts, text_target=responses)`."
                    )
            columns[name] = [torch.as_tensor(row[name]).tolist() for row in rows]
        return columns

    def _lengths(self, max_length: int | None, static: bool) -> tuple[int | None, int | None]:
        """How many tokens of a prompt the LLM and, for `fusion="align"`, the SLM get at most."""
        max_length = self.max_prompt_length if max_length is None else max_length
        slm_limits = [self.slm_max_prompt_length, max_length if static else None]
        return max_length, min((limit for limit in slm_limits if limit is not None), default=None)

    def _prompt_columns(
        self,
        prompts: list[str],
        truncation: bool,
        max_length: int | None,
        slm_max_length: int | None,
        add_special_tokens: bool,
    ) -> dict[str, list[list[int]]]:
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise ValueError(
                    f"Prompt {index} is no text but {type(prompt).__name__}; pass strings, or for all of them lists of "
                    'messages with "role" and "content".'
                )
            if not prompt.strip():
                raise ValueError(f"Prompt {index} is empty: the LLM needs text to read. Leave empty prompts out.")
        align = self.fusion == "align"
        cut = {"truncation": True, "max_length": max_length} if truncation and max_length else {}
        llm = self.llm_tokenizer(
            prompts, add_special_tokens=add_special_tokens, return_offsets_mapping=align, verbose=False, **cut
        )
        if not truncation and self.max_prompt_length is not None:
            for index, ids in enumerate(llm["input_ids"]):
                if len(ids) > self.max_prompt_length:
                    raise ValueError(
                        f"Prompt {index} is {len(ids)} tokens long, but these models take at most "
                        f"{self.max_prompt_length}. Shorten it, or pass `truncation=True` (and `max_length`)."
                    )
        columns = {"input_ids": llm["input_ids"], "attention_mask": [[1] * len(ids) for ids in llm["input_ids"]]}
        if not align:
            return columns
        columns |= {"slm_input_ids": [], "slm_attention_mask": [], "alignment": []}
        slm_cut = {"truncation": True, "max_length": slm_max_length}
        for index, (prompt, llm_offsets) in enumerate(zip(prompts, llm["offset_mapping"], strict=True)):
            # The SLM gets the characters that the LLM has read; white space at the ends too, unless it was cut off.
            start, end = 0, len(prompt)
            spans = [span for span in llm_offsets if span[1] > span[0]]
            if spans and llm.encodings[index].overflowing:
                start, end = (spans[0][0], end) if self.llm_tokenizer.truncation_side == "left" else (0, spans[-1][1])
            slm = self.tokenizer(
                prompt[start:end],
                add_special_tokens=add_special_tokens,
                return_offsets_mapping=True,
                verbose=False,
                **(slm_cut if truncation and slm_max_length else {}),
            )
            offsets = [(s + start, e + start) if e > s else (0, 0) for s, e in slm["offset_mapping"]]
            if self.slm_max_prompt_length is not None and len(offsets) > self.slm_max_prompt_length:
                raise ValueError(
                    f"Prompt {index} is {len(offsets)} SLM tokens long, but the SLM takes at most "
                    f"{self.slm_max_prompt_length}. Shorten it, or pass `truncation=True`."
                )
            columns["slm_input_ids"].append(slm["input_ids"])
            columns["slm_attention_mask"].append([1] * len(offsets))
            columns["alignment"].append(align_tokens(offsets, llm_offsets))
        return columns

    def response_ids(self, responses: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """
        Responses as the SLM is to write them: its tokens, with an end token, cut to `max_length` with it.

        Raises:
            ValueError: if the SLM's tokenizer has no end token.
        """
        tokenizer = self.tokenizer
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if end is None:
            raise ValueError(
                "The SLM's tokenizer has no end token, so a response would never end. Set `processor.tokenizer.eos_token`."
            )
        # A decoder-only SLM goes on from the prompt; what its tokenizer puts before a text does not belong there.
        rows = tokenizer(text_target=list(responses), add_special_tokens=self.slm_is_encoder_decoder, verbose=False)[
            "input_ids"
        ]
        for row in rows:
            if self.slm_is_encoder_decoder and row and row[0] == self.decoder_start_token_id != end:
                del row[0]
            if not row or row[-1] != end:
                row.append(end)
            while row[-2:] == [end, end]:  # in the text already
                del row[-1]
            if max_length is not None and len(row) > max_length:
                row[max_length - 1 :] = [end]
        return rows

    def decoder_input_ids(self, labels: torch.Tensor) -> torch.Tensor:
        """
        The response's tokens as the SLM gets them while it is scored on `labels`.

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, response_length)`): SLM tokens, padded with -100.

        Returns:
            For an encoder-decoder SLM, `labels` shifted right behind its start token; for a decoder-only SLM, `labels`
            without the last column, as the prompt's last state predicts the first token.
        """
        tokens = labels.masked_fill(labels == -100, self.tokenizer.pad_token_id or 0)[:, :-1]
        if not self.slm_is_encoder_decoder:
            return tokens
        if self.decoder_start_token_id is None:
            raise ValueError(
                "The processor does not know the token that the SLM starts from: set `processor.decoder_start_token_id`."
            )
        return torch.cat([torch.full_like(labels[:, :1], self.decoder_start_token_id), tokens], dim=1)

    def _padded(self, name: str, rows: list[list[int]], pad: bool, length: int | None) -> list[list[int]]:
        longest = max(map(len, rows))
        if not pad:
            if any(len(row) != longest for row in rows):
                raise ValueError("Rows of unequal length make no tensor: pass `padding=True`.")
            return rows
        length = max(longest, length or 0)
        tokenizer = self.tokenizer if name.startswith("slm_") or name == "alignment" else self.llm_tokenizer
        pad_token_id = tokenizer.pad_token_id or 0  # masked, so any token will do where a tokenizer has none
        value = {"input_ids": pad_token_id, "slm_input_ids": pad_token_id, "labels": -100}.get(name, 0)
        if name != "labels" and tokenizer.padding_side == "left":
            return [[value] * (length - len(row)) + row for row in rows]
        return [row + [value] * (length - len(row)) for row in rows]


class LLM2SLMTokenizer:
    """
    What `AutoTokenizer` comes to for a checkpoint of this model that has no tokenizer at its root: one with two.

    Where one tokenizer serves LLM and SLM, it lies at the root, and `AutoTokenizer` loads it like any other.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"{str(pretrained_model_name_or_path)!r} has two tokenizers, the LLM's for reading and the SLM's for writing, and "
            "no single one serves both. Load them together: `AutoProcessor.from_pretrained(...)`, with `.tokenizer` for "
            "the SLM's and `.llm_tokenizer` for the LLM's."
        )


def is_conversation(value: Any) -> bool:
    """Whether `value` is a list of messages, such as `[{"role": "user", "content": "Hello"}]`."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return False
    return all(isinstance(message, Mapping) and "role" in message for message in value)


def _is_single(text: Any) -> bool:
    return isinstance(text, str) or is_conversation(text)


def _some_texts(name: str, text: Any) -> list[Any]:
    """One text or several as a list. Raises a `ValueError` for none, by the `name` of the argument."""
    texts = [text] if _is_single(text) else list(text)
    if not texts:
        raise ValueError(f"`{name}` must hold at least one text, found none. Leave empty batches out.")
    return texts


def response_text(response: Any) -> str:
    """The text of a response, which may come as the assistant's message."""
    if is_conversation(response):
        if len(response) != 1 or response[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in response)
            raise ValueError(
                f"A response is one message of the assistant, got the roles {roles}. What comes before it is the prompt."
            )
        return response[0]["content"]
    return response


__all__ = ["LLM2SLMProcessor"]
