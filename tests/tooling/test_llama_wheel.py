"""What decides which wheel of llama.cpp is built and reused: a wrong one kills the process of who loads it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from console import SetupError, progress
from llama_backend import Found, pick
from llama_wheel import cpu_identity, key, split_lock

NOTHING = Found(nvidia_driver=None, nvcc=None, gpu_device=None, vulkan_loader=None, glslc=None)
EVERYTHING = Found(
    nvidia_driver="/proc/driver/nvidia/version",
    nvcc="/usr/local/cuda/bin/nvcc",
    gpu_device="/dev/dri/renderD128",
    vulkan_loader="/usr/lib/x86_64-linux-gnu/libvulkan.so",
    glslc="/usr/bin/glslc",
)


def _cpuinfo(*cores: dict[str, str]) -> str:
    return "\n\n".join("\n".join(f"{name}\t: {value}" for name, value in core.items()) for core in cores) + "\n"


WORDS = st.text("abcdefgh_0123456789", min_size=1, max_size=8)


@given(st.dictionaries(WORDS, WORDS, max_size=6), st.randoms(use_true_random=False))
def test_a_key_depends_on_the_inputs_and_not_on_their_order(inputs, random):
    shuffled = list(inputs.items())
    random.shuffle(shuffled)
    assert key(dict(shuffled)) == key(inputs)
    assert key({**inputs, "one more": ""}) != key(inputs)
    for name in inputs:
        assert key({**inputs, name: inputs[name] + "x"}) != key(inputs)


@given(
    st.sets(WORDS, min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 5000), st.randoms(use_true_random=False)
)
def test_a_cpu_is_its_model_and_instruction_sets(flags, cores, mhz, random):
    def core(number, mhz):
        order = sorted(flags)
        random.shuffle(order)
        return {"processor": str(number), "model name": "A CPU", "cpu MHz": str(mhz), "flags": " ".join(order)}

    here = cpu_identity(_cpuinfo(*(core(number, mhz) for number in range(cores))))
    assert here == cpu_identity(_cpuinfo(core(0, mhz + 1)))
    assert here != cpu_identity(_cpuinfo({**core(0, mhz), "flags": " ".join([*flags, "amx_tile"])}))
    assert here != cpu_identity(_cpuinfo({**core(0, mhz), "model name": "Another CPU"}))


def test_both_kinds_of_core_of_an_arm_cpu_count():
    little = {"processor": "0", "Features": "fp asimd", "CPU part": "0xd05"}
    big = {"processor": "1", "Features": "fp asimd dotprod", "CPU part": "0xd0b"}
    assert cpu_identity(_cpuinfo(little, big)) == cpu_identity(_cpuinfo(big, little))
    assert cpu_identity(_cpuinfo(little, big)) != cpu_identity(_cpuinfo(little))


def test_the_lock_is_split_into_what_is_built_and_the_rest():
    sums = "a" * 64, "b" * 64
    lock = (
        f"# llama.txt: a comment\ndiskcache==5.6.3 \\\n    --hash=sha256:{sums[0]}\n"
        f"llama-cpp-python==0.3.36 \\\n    --hash=sha256:{sums[1]}\n"
        f"numpy==2.4.6 ; python_full_version < '3.12' \\\n    --hash=sha256:{sums[0]}\n"
    )
    pin, rest = split_lock(lock)
    assert (pin.version, pin.sha256) == ("0.3.36", sums[1])
    assert "llama" not in rest.split("\n", 1)[1]
    assert "diskcache==5.6.3" in rest
    assert "numpy==2.4.6" in rest
    with pytest.raises(SetupError, match="by version and hash"):
        split_lock(lock.replace(f" \\\n    --hash=sha256:{sums[1]}", ""))


@pytest.mark.parametrize(
    ("found", "expected", "because"),
    [
        (NOTHING, "cpu", "no GPU"),
        (EVERYTHING, "cuda", "nvcc"),
        (Found(None, "/usr/local/bin/nvcc", None, None, None), "cpu", "no NVIDIA driver"),
        (Found("/dev/nvidiactl", None, None, None, None), "cpu", "install the CUDA toolkit"),
        (
            Found("/dev/nvidiactl", None, "/dev/dri/renderD128", "/usr/lib/libvulkan.so", "/usr/bin/glslc"),
            "vulkan",
            "glslc",
        ),
        (Found(None, None, "/dev/dri/renderD128", None, "/usr/bin/glslc"), "cpu", "libvulkan-dev"),
        (Found(None, None, None, "/usr/lib/libvulkan.so", "/usr/bin/glslc"), "cpu", "no GPU"),
    ],
)
def test_the_backend_follows_what_is_there_and_says_why(found, expected, because):
    backend = pick(found)
    assert backend.name == expected
    assert because in backend.why
    assert "-DLLAMA_BUILD_SERVER=OFF" in backend.cmake_flags


@pytest.mark.parametrize("name", ["cpu", "cuda", "vulkan"])
def test_the_backend_asked_for_wins_over_what_is_there(name):
    assert pick(EVERYTHING, name).name == name
    if name != "cpu":
        with pytest.raises(SetupError, match=f"CHORUS_LLAMA_BACKEND={name}"):
            pick(NOTHING, name)


def test_a_backend_that_is_none_is_refused_by_name():
    with pytest.raises(SetupError, match="CHORUS_LLAMA_BACKEND=rocm is no backend"):
        pick(EVERYTHING, "rocm")


def test_progress_is_read_from_what_builders_print():
    assert progress("  [57/140] /usr/bin/c++ -DGGML_BUILD -o x.o -c x.cpp\n") == "57 of 140 files built"
    assert progress("Collecting grpcio==1.85.1 (from -r base.txt)\n") == "grpcio==1.85.1"
    assert progress("x.cpp:12: warning: [57/140] isn't at the start\n") is None
