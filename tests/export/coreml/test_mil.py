"""The interpreter of Core ML programs: every operator against numpy, in packages that coremltools wrote."""

import numpy as np
import pytest
import torch

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.coreml.lower import silent
from edgedit_hf.export.coreml.mil import run_package

X = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
IMAGE = np.random.default_rng(1).normal(size=(1, 4, 5, 6)).astype(np.float32)
KERNEL = np.random.default_rng(2).normal(size=(2, 4, 3, 3)).astype(np.float32)


def package(path, build, *shapes):
    """A package of the program that `build(mb, *inputs)` makes; inputs are called x0, x1, …"""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program

    with silent():
        inputs = {f"x{index}": mb.placeholder(shape=shape) for index, shape in enumerate(shapes)}
        with Function(inputs, opset_version=ct.target.iOS18) as function:
            outputs = build(mb, *(function.inputs[name] for name in inputs))
            function.set_outputs([mb.identity(x=value, name=name) for name, value in outputs.items()])
        program = Program()
        program.add_function("main", function)
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            pass_pipeline=ct.PassPipeline.EMPTY,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        model.save(str(path))
    return path


def norm(x, axes):
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5)


def softmax(x):
    exponents = np.exp(x - x.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


def convolution(x, kernel):
    """Stride 1, one pixel of padding above and left, two below and right."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 2), (1, 2)))
    height, width = x.shape[2] - 2, x.shape[3] - 2
    found = np.zeros((1, 2, height, width))
    for row in range(height):
        for column in range(width):
            found[0, :, row, column] = (kernel * x[0, :, row : row + 3, column : column + 3]).sum((1, 2, 3))
    return found


def test_operators_compute_what_numpy_computes(tmp_path):
    def build(mb, x, image):
        first, second = mb.split(x=x, num_splits=2, axis=1)
        return {
            "linear": mb.linear(x=x, weight=X[0], bias=np.arange(4, dtype=np.float32)),
            "matmul": mb.matmul(x=x, y=x, transpose_y=True),
            "softmax": mb.softmax(x=x, axis=-1),
            "layer_norm": mb.layer_norm(x=x, axes=[-1], gamma=X[0, 0], beta=X[0, 1], epsilon=1e-5),
            "attention": mb.scaled_dot_product_attention(query=first, key=second, value=second),
            "transpose": mb.transpose(x=x, perm=[2, 0, 1]),
            "reshape": mb.reshape(x=x, shape=[0, -1]),
            "concat": mb.concat(values=[second, first], axis=1),
            "stack": mb.stack(values=[first, second], axis=1),
            "slice": mb.slice_by_index(
                x=x,
                begin=[0, 1, 5],
                end=[0, 4, 0],
                stride=[1, 2, 1],
                begin_mask=[True, False, False],
                end_mask=[True, False, False],
                squeeze_mask=[False, False, True],
            ),
            "gather": mb.gather(x=x, indices=np.array([[2, 0], [1, 1]]), axis=1),
            "tile": mb.tile(x=x, reps=[1, 2, 1]),
            "pad": mb.pad(x=x, pad=[0, 0, 1, 2, 3, 0], mode="constant", constant_val=7.0),
            "mean": mb.reduce_mean(x=x, axes=[0, 2], keep_dims=False),
            "length": mb.reduce_l2_norm(x=x, axes=[-1], keep_dims=True),
            "select": mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=mb.mul(x=x, y=0.1)),
            "gelu": mb.gelu(x=x, mode="TANH_APPROXIMATION"),
            "silu": mb.silu(x=x),
            "clip": mb.clip(x=x, alpha=-0.5, beta=0.25),
            "conv": mb.conv(x=image, weight=KERNEL, pad_type="custom", pad=[1, 2, 1, 2]),
            "shuffle": mb.pixel_shuffle(x=image, upscale_factor=2),
            "upsample": mb.upsample_nearest_neighbor(x=image, scale_factor_height=2, scale_factor_width=3),
            "expand": mb.expand_dims(x=x, axes=[0, -1]),
        }

    path = package(tmp_path / "a.mlpackage", build, X.shape, IMAGE.shape)
    found = run_package(path, {"x0": torch.from_numpy(X), "x1": torch.from_numpy(IMAGE)})
    first, second = X[:, :2], X[:, 2:]
    picture = IMAGE.reshape(1, 1, 2, 2, 5, 6)
    expected = {
        "linear": X @ X[0].T + np.arange(4),
        "matmul": X @ X.transpose(0, 2, 1),
        "softmax": softmax(X),
        "layer_norm": norm(X, -1) * X[0, 0] + X[0, 1],
        "attention": softmax(first @ second.transpose(0, 2, 1) / np.sqrt(6)) @ second,
        "transpose": X.transpose(2, 0, 1),
        "reshape": X.reshape(2, -1),
        "concat": np.concatenate([second, first], 1),
        "stack": np.stack([first, second], 1),
        "slice": X[:, 1:4:2, 5],
        "gather": X[:, [[2, 0], [1, 1]]],
        "tile": np.concatenate([X, X], 1),
        "pad": np.pad(X, ((0, 0), (1, 2), (3, 0)), constant_values=7.0),
        "mean": X.mean((0, 2)),
        "length": np.sqrt((X**2).sum(-1, keepdims=True)),
        "select": np.where(X > 0, X, 0.1 * X),
        "gelu": 0.5 * X * (1 + np.tanh(np.sqrt(2 / np.pi) * (X + 0.044715 * X**3))),
        "silu": X / (1 + np.exp(-X)),
        "clip": X.clip(-0.5, 0.25),
        "conv": convolution(IMAGE, KERNEL),
        "shuffle": picture.transpose(0, 1, 4, 2, 5, 3).reshape(1, 1, 10, 12),
        "upsample": IMAGE.repeat(2, 2).repeat(3, 3),
        "expand": X[None, ..., None],
    }
    for name, value in expected.items():
        assert tuple(found[name].shape) == value.shape, name
        assert np.allclose(found[name].numpy(), value, atol=1e-5), name


def test_packed_weights_are_unpacked_by_their_definition(tmp_path):
    lut = np.array([[-1.0, 0.5, 2.0, 4.0], [0.0, 1.0, 3.0, 9.0]], np.float32)  # of two runs of two rows
    indices = np.array([[0, 3, 1], [2, 2, 0], [1, 0, 3], [3, 2, 1]], np.uint8)
    data = np.array([[-8, 7, 1, 0], [3, -2, 5, 4]], np.int8)
    scale, offset = np.array([[0.5, 2.0], [1.0, 0.25]], np.float32), np.array([[1, 0], [-2, 3]], np.int8)

    def build(mb, x):
        from coremltools.converters.mil.mil import types

        two, four = types.string_to_nptype("uint2"), types.string_to_nptype("int4")
        palette = mb.constexpr_lut_to_dense(indices=indices.astype(two), lut=lut.reshape(2, 1, 4, 1))
        grid = mb.constexpr_blockwise_shift_scale(data=data.astype(four), scale=scale, offset=offset.astype(four))
        return {"palette": mb.add(x=palette, y=x), "grid": mb.mul(x=grid, y=mb.add(x=x, y=1.0))}

    found = run_package(package(tmp_path / "a.mlpackage", build, (1, 1)), {"x0": torch.zeros(1, 1)})
    assert found["palette"].tolist() == [[lut[row // 2][entry] for entry in indices[row]] for row in range(4)]
    blocks = [[scale[row][k // 2] * (data[row][k] - offset[row][k // 2]) for k in range(4)] for row in range(2)]
    assert found["grid"].tolist() == blocks


def test_half_precision_rounds_where_the_program_declares_it(tmp_path):
    def build(mb, x):
        half = mb.cast(x=x, dtype="fp16")
        return {"y": mb.cast(x=mb.add(x=half, y=np.float16(1.0)), dtype="fp32")}

    value = torch.tensor([[1 / 3, 2049.0, 1e-4]])
    found = run_package(package(tmp_path / "a.mlpackage", build, (1, 3)), {"x0": value})["y"]
    assert np.array_equal(found.numpy(), (value.numpy().astype(np.float16) + np.float16(1)).astype(np.float32))


def test_what_it_does_not_know_is_an_error(tmp_path):
    path = package(tmp_path / "a.mlpackage", lambda mb, x: {"y": mb.erf(x=x)}, (1, 3))
    with pytest.raises(EdgeDiTError, match="has the operator 'erf', which can be run by Core ML only"):
        run_package(path, {"x0": torch.zeros(1, 3)})
    with pytest.raises(EdgeDiTError, match="takes the inputs x0; y were given"):
        run_package(path, {"y": torch.zeros(1, 3)})
