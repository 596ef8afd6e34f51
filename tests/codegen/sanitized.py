"""Kernels of the operator tests under the address and undefined-behaviour sanitizers: `python tests/codegen/sanitized.py`.

Without arguments a sample of every family; with arguments those are pytest's, and every kernel that it builds is sanitized, at leisure:
`python tests/codegen/sanitized.py tests/codegen/test_cpp_kernels.py`. Tensors are allocated under the sanitizer too, so each ends at its
last byte: reading one element further is an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = ("libasan.so", "libubsan.so")
FLAGS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")

KERNELS = (
    "bias_gelu", "transposed", "strided_store", "symbolic_pointwise", "rotate_half", "cat_uneven", "pad_reflect_free", "embedding",
    "gather_elements", "causal_mask", "half_types", "mixed_ranks", "row_scans", "argmax_two_axes",
)  # fmt: skip
CONTRACTIONS = (
    "linear_columns_70_50_33", "linear_rows_9_1_40", "linear_packed_3_17_400", "linear_packed_17_64_0", "deep_columns_3", "symbolic_all",
    "heads_epilogue", "gathered_rows", "convolution_channels_last", "convolution_channels_first", "batched", "thin_bfloat16_packed",
)  # fmt: skip
WORDS = (
    "int8_1", "int4_5", "int4_70", "int4_odd", "int4_padded_depth", "int4_padded_bytes", "int8_one_column_more", "uint8_zeros_3",
    "dynamic_3", "dynamic_40", "epilogue_3", "bf16_3", "f16_40", "bfp6_odd", "split_3", "split_odd", "narrow_odd", "no_rows",
    "one_of_some_rows",
)  # fmt: skip
ATTENTIONS = ("causal, fewer keys than queries", "narrow heads", "padding", "decode, grouped", "bfloat16", "sizes known at run time",
              "a step, int8 cache", "a step, int4 cache", "steps, int4 cache", "many steps, int8 cache", "columns in pairs")  # fmt: skip
CONVOLUTIONS = ("stem", "border_only", "longer_than_registers", "tiles_beyond_the_image")
WINDOWS = ("tails", "stride_dilation", "wide_padding", "symbolic", "max_ceil", "avg_ceil_uncounted")


def environment() -> dict[str, str] | None:
    """What a process needs so that its kernels can be sanitized; None where the compiler has no such libraries."""
    from tilewright.codegen.build import find_compiler

    compiler = find_compiler()
    if compiler is None:
        return None
    ask = [subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True) for name in LIBRARIES]
    found = [result.stdout.strip() for result in ask]
    if not all(os.path.isabs(path) for path in found):
        return None
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}  # Python leaks as it ends
    return {**os.environ, **options, "LD_PRELOAD": " ".join(found), "PYTHONPATH": path}


def sanitize() -> None:
    """Kernels that this process builds from now on are sanitized."""
    from tilewright.codegen import build

    build.FLAGS = (*(f for f in build.FLAGS if f not in ("-O3", "-s")), *FLAGS)


def sample() -> None:
    """Calls operator tests on some of their cases, all of which are compiled together."""
    import test_cpp_attention as attention
    import test_cpp_contractions as contractions
    import test_cpp_convolutions as convolutions
    import test_cpp_kernels as kernels
    import test_cpp_windows as windows
    import test_cpp_words as words
    import test_recurrence_kernels as recurrences
    from tilewright.codegen.cpp.schedule import CpuTarget
    from tilewright.codegen.cpp.toolchain import compile_kernels
    from tilewright.codegen.lower import lower

    made = {("kernel", name): kernels.CASES[name][0].kernel for name in KERNELS}
    made |= {("contraction", name): contractions.CASES[name][0].kernel for name in CONTRACTIONS}
    made |= {("convolution", name): replace(convolutions.CASES[name][0], name=f"k_convolution_{name}") for name in CONVOLUTIONS}
    made |= {("attention", name): lower(attention.graph(attention.CASES[name]), f"k_attention_{n}") for n, name in enumerate(ATTENTIONS)}
    layers = {name: words.CASES[name].graph() for name in WORDS}
    regions = {name: words.region_of(graph) for name, graph in layers.items()}
    made |= {("words", name): lower(region.attrs["body"], f"k_words_{name}") for name, region in regions.items()}
    made |= {("windows", name): lower(windows.CASES[name].graph(), f"k_windows_{name}") for name in WINDOWS}
    compiled = dict(zip(made, compile_kernels(list(made.values()))))
    for (family, name), function in compiled.items():
        if family == "kernel":
            kernels.test_kernel_computes_what_the_reference_does(name, {name: function})
        elif family == "contraction":
            contractions.test_kernel_computes_what_the_reference_does(name, {name: function})
        elif family == "convolution":
            convolutions.test_convolution_computes_what_the_reference_does(name, {name: function})
        elif family == "words":
            words.test_words_give_what_the_meaning_gives(name, {name: (layers[name], regions[name], function)})
        elif family == "attention":
            attention.test_against_the_meaning(name, {name: function})
        else:
            for threads in (1, 2):
                windows.test_windows(name, threads, {name: function})
    graph, values = recurrences.layer("lstm", 3, 7, 37)
    recurrences.check(graph, lower(graph, "k_lstm"), values, CpuTarget(32, level="native"))
    print(f"{len(made) + 1} kernels are clean")


def main(arguments: list[str]) -> int:
    if LIBRARIES[0] not in os.environ.get("LD_PRELOAD", ""):
        wanted = environment()
        if wanted is None:
            print("the compiler has no sanitizers", file=sys.stderr)
            return 2
        return subprocess.run([sys.executable, __file__, *arguments], env=wanted).returncode
    del os.environ["LD_PRELOAD"]  # the compiler needs none of it
    sanitize()
    if not arguments:
        sample()
        return 0
    import pytest

    return int(pytest.main(["-p", "no:cacheprovider", *arguments]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
