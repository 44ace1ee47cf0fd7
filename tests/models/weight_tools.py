"""Small networks with the values of trained ones, and files of them."""

import torch

from medspark.models import create_encoder

TINY = {"block_inplanes": [4, 4, 8, 8]}


def scramble(network, seed=1):
    """Values of a trained network: nothing is 0, 1 or as the constructor leaves it."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            scale = max(1, tensor[0].numel()) ** -0.5 if tensor.ndim > 1 else 0.3
            tensor.copy_(1 + scale * noise.abs() if name.endswith("var") else scale * noise)
        else:
            tensor.fill_(41)
    return network.eval()


def resnet(name="resnet10", seed=1, **options):
    return scramble(create_encoder(name, **{**TINY, **options}), seed)


def last_map(network, x):
    """Output of a ResNet's last stage."""
    found = []
    handle = network.layer4.register_forward_hook(lambda m, args, out: found.append(out))
    with torch.no_grad():
        network(x)
    handle.remove()
    return found[0]


def below(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def saved(tmp_path, content, name="file.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def equal(a, b):
    one, two = a.state_dict(), b.state_dict()
    return list(one) == list(two) and all(torch.equal(v, two[k]) for k, v in one.items())


def rgb(seed=1, **options):
    return resnet(seed=seed, spatial_dims=2, n_input_channels=3, **options)
