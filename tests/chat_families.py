"""Real chat templates with a byte-level tokenizer that has their special tokens, for tests of ids and masks."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "data" / "chat_templates"
SAID, LATER = "It is 7.", "8, so\nit goes."


@dataclass(frozen=True)
class Family:
    """A template and what is known of its models.

    `answer` is what such a model has to write for the content `{}`, up to the token at which it stops. `rewrites`: what
    was written in one turn is not what the next is answered after. `thought`: how an answer must start, of which
    `<think>` and the line's end are part of the prompt.
    """

    name: str
    answer: str
    eos: str
    bos: str = "<s>"
    stops: tuple[str, ...] = ()
    rewrites: bool = False
    system: bool = True
    trims: bool = False
    thought: str = ""

    def template(self, suffix: str = "") -> str:
        return (FOLDER / f"{self.name}{suffix}.jinja").read_text(encoding="utf-8")

    def expected(self, content: str) -> str:
        """What the model has to write for a content."""
        return self.answer.format(content.strip() if self.trims else content)


THOUGHT = "<think>\nso\n</think>\n\n"
QWEN3_5 = "\n</think>\n\n{}<|im_end|>"
LLAMA_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
THINK = "<think>\n\n</think>\n\n"
FAMILIES = (
    Family("alpaca", "{}</s>", "</s>"),
    Family("chatml", "{}<|im_end|>", "<|im_end|>"),
    Family("smollm2", "{}<|im_end|>", "<|im_end|>"),
    Family("cohere", "{}<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", trims=True),
    Family("cohere2", "{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>"),
    Family(
        "deepseek_r1_distill",
        "{}<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        rewrites=True,
        thought=THOUGHT,
    ),
    Family(
        "deepseekv3",
        "{}<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        rewrites=True,
        thought=THOUGHT,
    ),
    Family("exaone", "{}[|endofturn|]", "[|endofturn|]", "[BOS]"),
    Family("gemma", "{}<end_of_turn>", "<eos>", "<bos>", ("<eos>", "<end_of_turn>"), system=False, trims=True),
    Family("gemma3", "{}<end_of_turn>", "<eos>", "<bos>", ("<eos>", "<end_of_turn>"), trims=True),
    Family(
        "glm4moe",
        "\n<think></think>\n{}<|user|>",
        "<|endoftext|>",
        "[gMASK]",
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        trims=True,
    ),
    Family(
        "gptoss",
        "<|channel|>final<|message|>{}<|return|>",
        "<|return|>",
        "<|startoftext|>",
        ("<|return|>", "<|endoftext|>", "<|call|>"),
        rewrites=True,
    ),
    Family("lfm2_2_5", "{}<|im_end|>", "<|im_end|>", "<|startoftext|>"),
    Family("llama3", "{}<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>", trims=True),
    Family("llama3_1", "{}<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>", LLAMA_STOPS, trims=True),
    Family("llama3_2", "{}<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>", LLAMA_STOPS, trims=True),
    Family("mistral_v1", " {}</s>", "</s>"),
    Family("mistral_v2v3", " {}</s>", "</s>", trims=True),
    Family("mistral_v7_tekken", "{}</s>", "</s>"),
    Family("phi3", "{}<|end|>", "<|endoftext|>", "<s>", ("<|end|>", "<|endoftext|>")),
    Family("phi3_5", "{}<|end|>", "<|endoftext|>", "<s>", ("<|end|>", "<|endoftext|>")),
    Family("phi_4", "{}<|im_end|>", "<|im_end|>", "<|endoftext|>"),
    Family("qwen2_5", "{}<|im_end|>", "<|im_end|>", "<|endoftext|>"),
    Family("qwen3", THINK + "{}<|im_end|>", "<|im_end|>", "<|endoftext|>", rewrites=True),
    Family("qwen3_instruct_2507", "{}<|im_end|>", "<|im_end|>", "<|endoftext|>"),
    Family("qwen3_5_think", QWEN3_5, "<|im_end|>", "<|endoftext|>", rewrites=True, trims=True),
)
MARKED = (
    *("cohere", "cohere2", "gemma", "gemma3", "glm4moe"),
    *("llama3", "phi3", "phi3_5", "qwen2_5", "qwen3_instruct_2507"),
)
_BUILT_IN = re.compile(
    r"<[|｜][^<>{}'\"]+?[|｜]>|<(?:start|end)_of_turn>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_\w+|gMASK)\]|<sop>"
)


def tokenizer_of(family: Family, folder: Path, template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, the family's special tokens and its template, loaded from a folder as a model's is."""
    text = family.template()
    named = {family.bos, family.eos, *family.stops, *_BUILT_IN.findall(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in sorted(named)])
    whole = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=template or text,
        clean_up_tokenization_spaces=False,
    )
    whole.save_pretrained(folder)
    stops = whole.convert_tokens_to_ids([family.eos, *family.stops])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    loaded = AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded
