"""What a saved Core ML program computes, operator by operator, in PyTorch: Core ML runs on Apple's systems alone.

Runs where coremltools is installed, and nothing of this project. The operators are those that the packaged model needs,
as coremltools' reference of MIL operators has them.
"""

import coremltools
import torch
import torch.nn.functional as F
from coremltools.converters.mil.frontend.milproto.load import load

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}


def conv(x, weight, strides, pad_type, pad, dilations, groups, bias=None):
    sides = len(strides)
    if pad_type == "same":
        raise ValueError("A convolution padded as `same`: its padding depends on strides, and no export here has one.")
    if pad_type == "custom":  # before and after each axis, the first axis first
        x = F.pad(x, [int(n) for axis in reversed(range(sides)) for n in pad[2 * axis : 2 * axis + 2]])
    run = {1: F.conv1d, 2: F.conv2d}[sides]
    return run(x, weight, bias, strides.tolist(), 0, dilations.tolist(), int(groups))


def sliced(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    chosen = []
    for axis in range(x.dim()):
        if squeeze_mask is not None and squeeze_mask[axis]:
            chosen.append(int(begin[axis]))
            continue
        first = None if begin_mask is not None and begin_mask[axis] else int(begin[axis])
        last = None if end_mask is not None and end_mask[axis] else int(end[axis])
        chosen.append(slice(first, last, 1 if stride is None else int(stride[axis])))
    return x[tuple(chosen)]


def expanded(x, axes):
    for axis in axes.tolist():
        x = x.unsqueeze(axis)
    return x


def matmul(x, y, transpose_x=False, transpose_y=False):
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def split(x, axis, split_sizes=None, num_splits=None):
    sizes = x.shape[int(axis)] // int(num_splits) if split_sizes is None else split_sizes.tolist()
    return x.split(sizes, int(axis))


def reduced(function):
    return lambda x, axes, keep_dims: function(x, axes.tolist(), bool(keep_dims))


def gelu(x, mode):
    return F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


def layer_norm(x, axes, gamma, beta, epsilon):
    if axes.tolist() != [-1]:
        raise ValueError(f"A layer_norm over the axes {axes}: those of exports here are over the last one.")
    return F.layer_norm(x, x.shape[-1:], gamma, beta, float(epsilon))


def number(value):
    """Constants of one number as such, so that they do not change the type of what they are combined with."""
    return value.item() if hasattr(value, "item") and value.ndim == 0 else value


def binary(function):
    return lambda x, y: function(*(torch.as_tensor(number(each)) for each in (x, y)))


OPERATORS = {
    "add": binary(torch.add),
    "cast": lambda x, dtype: x.to(DTYPES[dtype]),
    "clip": lambda x, alpha, beta: x.clip(float(alpha), float(beta)),
    "concat": lambda values, axis, interleave: torch.cat(values, int(axis)),
    "conv": conv,
    "equal": binary(torch.eq),
    "expand_dims": expanded,
    "fill_like": lambda ref_tensor, value: torch.full_like(ref_tensor, float(value)),
    "gather": lambda x, indices, axis, **_: x.index_select(int(axis), torch.as_tensor(indices.astype(int))),
    "gelu": gelu,
    "layer_norm": layer_norm,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "log": lambda x, epsilon: (x + float(epsilon)).log(),
    "logical_not": lambda x: ~x,
    "matmul": matmul,
    "mul": binary(torch.mul),
    "pow": binary(torch.pow),
    "reduce_max": reduced(torch.amax),
    "reduce_mean": reduced(torch.mean),
    "reduce_sum": reduced(torch.sum),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "select": lambda cond, a, b: torch.where(cond, torch.as_tensor(a), torch.as_tensor(b)),
    "slice_by_index": sliced,
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "split": split,
    "sqrt": torch.sqrt,
    "sub": binary(torch.sub),
    "tanh": torch.tanh,
    "tile": lambda x, reps: x.repeat(reps.tolist()),
    "transpose": lambda x, perm: x.permute(perm.tolist()),
}


def evaluated(package: str, **inputs: torch.Tensor) -> torch.Tensor:
    """The one output of a saved program."""
    model = coremltools.models.MLModel(package, skip_model_load=True)
    spec = model.get_spec()
    function = load(spec, spec.specificationVersion, model.weights_dir).functions["main"]
    values = dict(inputs)

    def value(variable):
        if isinstance(variable, list | tuple):
            return [value(each) for each in variable]
        if variable.val is None:
            return values[variable.name]
        array = variable.val
        floats = getattr(array, "ndim", 0) > 0 and array.dtype.kind == "f"
        return torch.from_numpy(array.copy()) if floats else array

    for operation in function.operations:
        if operation.op_type != "const":
            given = {name: value(each) for name, each in operation.inputs.items() if each is not None}
            found = OPERATORS[operation.op_type](**given)
            found = found if isinstance(found, tuple | list) else [found]
            values |= {each.name: part for each, part in zip(operation.outputs, found, strict=True)}
    (output,) = function.outputs
    return values[output.name]
