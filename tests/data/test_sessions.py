import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, Subset

from ncmethods import data
from ncmethods._core import InputError
from ncmethods.data import ClassIncremental, ClassSchedule, task_mask
from ncmethods.features import FeatureSet

# LUCIR's and PyCIL's order of CIFAR-100, of which the first ten are in the sheet.
FIRST_TEN = (68, 56, 78, 8, 23, 84, 90, 65, 74, 76)

# NCT's ORDER_2023, the permutation of its shuffled long tail: its first and last ten.
# https://github.com/NeuralCollapseApplications/UniCIL/blob/4ad5fec7dac7bd3ecf734fb83247754033f4403f/mmcil/datasets/cifar100_cil.py#L62
ORDER_2023 = [56, 12, 68, 0, 82, 66, 91, 44, 46, 20], [22, 86, 52, 3, 92, 33, 55, 70, 25, 87]

# The first list of new classes of CIFAR-100: five samples of each of five classes.
# https://github.com/xyutao/fscil/blob/e76d37c9bdb64474b323ee97c312148fb704e91f/data/index_list/cifar100/session_2.txt
TOPIC = [
    *(29774, 33344, 4815, 6772, 48317),
    *(29918, 33262, 5138, 7342, 47874),
    *(28864, 32471, 4316, 6436, 47498),
    *(29802, 33159, 3730, 5093, 47740),
    *(30548, 34549, 2845, 4996, 47866),
]


def images(labels, num_classes=None):
    labels = torch.as_tensor(labels)
    K = num_classes or int(labels.max()) + 1
    pixels = torch.arange(len(labels)).to(torch.uint8).view(-1, 1, 1, 1)
    return data.ImageData(pixels, labels, tuple(f"c{c}" for c in range(K)))


class Plain(Dataset):
    """A map-style dataset as torchvision's: items (x, y), and a list of targets."""

    def __init__(self, targets, as_dict=False):
        self.targets, self.as_dict = list(targets), as_dict

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        y = self.targets[i]
        return {"image": 10 * i, "label": y, "id": i} if self.as_dict else (10 * i, y, "more")


# --- schedules ----------------------------------------------------------------------------------


def test_seeded_orders_of_the_field():
    assert ClassSchedule(100, 0, 10).order[:10] == FIRST_TEN
    assert ClassSchedule(10, 0, 2).order == (4, 2, 7, 6, 0, 3, 5, 8, 9, 1)
    assert ClassSchedule(10, 0, 2, seed=None).order == tuple(range(10))
    assert ClassSchedule(10, 0, 2, seed=0).order != ClassSchedule(10, 0, 2, seed=1).order
    given = (3, 1, 2, 0)
    assert ClassSchedule(4, 2, 2, order=given, seed=7).order == given


@pytest.mark.parametrize(
    ("K", "base", "increment", "sizes"),
    [
        (100, 0, 10, [10] * 10),
        (100, 50, 10, [50] + [10] * 5),
        (100, 50, 2, [50] + [2] * 25),
        (100, 60, 5, [60] + [5] * 8),
        (200, 100, 10, [100] + [10] * 10),
        (10, 6, 1, [6, 1, 1, 1, 1]),
        (10, 0, 3, [3, 3, 3, 1]),
        (10, 4, 4, [4, 4, 2]),
        (10, 0, 30, [10]),
        (10, 10, 0, [10]),
        (10, 10, 3, [10]),
        (10, 9, 5, [9, 1]),
    ],
)
def test_sizes_of_sessions(K, base, increment, sizes):
    schedule = ClassSchedule(K, base, increment)
    assert [len(group) for group in schedule.sessions] == sizes
    assert schedule.boundaries == tuple(sum(sizes[:t]) for t in range(len(sizes) + 1))
    assert (len(schedule), schedule.num_classes) == (len(sizes), K)
    assert sorted(schedule.order) == list(range(K))


def pycil_sizes(K, init_cls, increment):
    """Sizes as PyCIL counts them.

    https://github.com/LAMDA-CL/PyCIL/blob/f3509b8ca3f20660ce4aa13f19d5283de81b4b35/utils/data_manager.py#L16
    """
    sizes = [init_cls]
    while sum(sizes) + increment < K:
        sizes.append(increment)
    return sizes + [K - sum(sizes)] * (sum(sizes) < K)


@given(st.integers(2, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_as_pycil(K, init_cls, increment, seed):
    if init_cls > K:
        return
    config = {"init_cls": init_cls, "increment": increment, "shuffle": True, "seed": [seed]}
    schedule = ClassSchedule.from_pycil(config | {"model_name": "icarl"}, K)
    assert [len(group) for group in schedule.sessions] == pycil_sizes(K, init_cls, increment)
    np.random.seed(seed)
    order = np.random.permutation(K).tolist()
    assert list(schedule.order) == order
    labels = torch.arange(K).flip(0)
    assert schedule.remap(labels).tolist() == [order.index(y) for y in labels.tolist()]
    plain = ClassSchedule.from_pycil(config | {"shuffle": False}, K)
    assert plain.order == tuple(range(K))


def test_pycil_config_that_is_none():
    config = {"init_cls": 2, "increment": 2, "shuffle": True}
    with pytest.raises(InputError, match="seed"):
        ClassSchedule.from_pycil(config, 10)
    with pytest.raises(InputError, match="2 trainings"):
        ClassSchedule.from_pycil(config | {"seed": [1, 2]}, 10)


def test_remap_and_tasks():
    schedule = ClassSchedule.from_groups([[5, 2], (9,), iter([0, 7])])
    y = torch.tensor([9, 5, -1, 0, 7, 2, -3])
    assert schedule.remap(y).tolist() == [2, 0, -1, 3, 4, 1, -3]
    assert schedule.remap(y.int()).dtype == torch.int64
    assert schedule.tasks(schedule.remap(y)).tolist() == [1, 0, -1, 2, 2, 0, -1]
    assert schedule.remap(torch.tensor([], dtype=torch.int64)).shape == (0,)
    for lost in (1, 10, 10**9):
        with pytest.raises(InputError, match=rf"no session for the classes \[{lost}\]"):
            schedule.remap(torch.tensor([0, lost]))


def test_total_may_be_unknown():
    schedule = ClassSchedule(4, 0, 2, seed=None).extend(3).extend([20, 10])
    assert schedule.sessions == ((0, 1), (2, 3), (4, 5, 6), (20, 10))
    assert schedule.boundaries == (0, 2, 4, 7, 9)
    assert schedule.remap(torch.tensor([10, 20])).tolist() == [8, 7]
    assert schedule == ClassSchedule.from_groups(schedule.sessions)
    assert hash(schedule) == hash(ClassSchedule.from_groups(schedule.sessions))
    assert schedule != ClassSchedule(4, 0, 2, seed=None)
    early, late = ClassSchedule(4, 0, 2).extend(2), ClassSchedule(4, 0, 2)
    assert early.order[:4] == late.order  # numbers that were given stay
    assert "4 classes: 2 + 2" in repr(late)


def test_task_mask():
    schedule = ClassSchedule(7, 3, 2)
    masks = torch.stack([task_mask(schedule, t) for t in range(3)])
    assert masks.tolist() == [
        [True] * 3 + [False] * 4,
        [False] * 3 + [True] * 2 + [False] * 2,
        [False] * 5 + [True] * 2,
    ]
    y = torch.arange(7)
    assert torch.equal(masks.int().argmax(0), schedule.tasks(y))
    for task in (-1, 3):
        with pytest.raises(InputError, match="0 … 2"):
            task_mask(schedule, task)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"base": 11, "increment": 2}, "cannot arrive"),
        ({"base": 0, "increment": 0}, "cannot arrive"),
        ({"base": 5, "increment": 0}, "cannot arrive"),
        ({"base": -1, "increment": 2}, "base"),
        ({"base": 2, "increment": 2.0}, "increment"),
        ({"base": 2, "increment": 2, "num_classes": 0}, "num_classes"),
        ({"base": 2, "increment": 2, "order": [0, 1, 2]}, "order must hold"),
        ({"base": 2, "increment": 2, "order": [0] * 10}, "order must hold"),
        ({"base": 2, "increment": 2, "seed": -1}, "seed"),
    ],
)
def test_schedules_that_cannot_be(arguments, match):
    with pytest.raises(InputError, match=match):
        ClassSchedule(**{"num_classes": 10} | arguments)


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        ([], "whole schedule"),
        ([[0], []], "session 1"),
        ([[0, 1], [1]], r"\[1\]"),
        ([[0, -2]], r"\[-2\]"),
    ],
)
def test_groups_that_cannot_be(groups, match):
    with pytest.raises(InputError, match=match):
        ClassSchedule.from_groups(groups)


# --- sessions -----------------------------------------------------------------------------------


def test_sessions_of_images():
    train, test = images([0, 1, 2, 3, 4] * 6), images([4, 3, 2, 1, 0] * 2)
    schedule = ClassSchedule(5, 2, 2)
    stream = ClassIncremental(train, schedule, test=test)
    assert len(stream) == 3
    for t, session in enumerate(stream):
        assert session.index == t
        assert session.new == schedule.sessions[t]
        assert session.seen == schedule.order[: schedule.boundaries[t + 1]]
        wanted = [i for i, y in enumerate(train.labels.tolist()) if y in session.new]
        assert session.train_indices.tolist() == wanted
        assert session.train_labels.tolist() == [
            schedule.order.index(int(train.labels[i])) for i in wanted
        ]
        seen = [i for i, y in enumerate(test.labels.tolist()) if y in session.seen]
        assert session.test_indices.tolist() == seen
        assert session.test_tasks.tolist() == [
            next(s for s, g in enumerate(schedule.sessions) if int(test.labels[i]) in g)
            for i in seen
        ]
        assert isinstance(session.train, data.ImageData)
        assert torch.equal(session.train.images, train.images[session.train_indices])
        assert torch.equal(session.train.labels, session.train_labels)
        assert torch.equal(session.test_seen.labels, session.test_labels)
        assert torch.equal(session.test_seen.images, test.images[session.test_indices])
        # A class keeps its name, and statistics of all sessions have the same K.
        assert session.train.classes == tuple(train.classes[c] for c in schedule.order)
    union = torch.cat([session.train_indices for session in stream])
    assert union.sort().values.tolist() == list(range(30))
    with pytest.raises(IndexError, match="0 … 2"):
        stream[3]


def test_exemplars_join_the_session():
    train = images([0, 1, 2, 3] * 3)
    stream = ClassIncremental(train, ClassSchedule(4, 2, 1, seed=None))
    memory = torch.tensor([8, 1])  # of the classes 0 and 1
    both = stream[1].train_with(memory)
    assert both.labels.tolist() == [2, 2, 2, 0, 1]
    assert both.images.flatten().tolist() == [2, 6, 10, 8, 1]
    assert stream.labels_of(memory).tolist() == [0, 1]


@pytest.mark.parametrize("as_dict", [False, True])
def test_any_map_style_dataset(as_dict):
    plain = Plain([0, 1, 2, 3] * 5, as_dict)
    stream = ClassIncremental(plain, ClassSchedule(4, 0, 2, order=[3, 0, 2, 1]), test=plain)
    part = stream[1].train
    assert len(part) == 10
    assert part.targets.tolist() == [3, 2] * 5
    assert data.class_counts(part).tolist() == [0, 0, 5, 5]
    if as_dict:
        assert part[1] == {"image": 20, "label": 2, "id": 2}
    else:
        assert part[1] == (20, 2, "more")
        x, y, _ = next(iter(DataLoader(part, batch_size=10)))
        assert x.tolist() == [10 * i for i in stream[1].train_indices.tolist()]
        assert y.tolist() == part.targets.tolist()


def test_subset_and_feature_set():
    inner = Subset(Plain([9, 0, 1, 0, 1]), [1, 2, 3, 4])  # no class 9 in it
    stream = ClassIncremental(inner, ClassSchedule(2, 1, 1, order=[1, 0]))
    assert stream[0].train_indices.tolist() == [1, 3]
    assert [stream[0].train[i] for i in range(2)] == [(20, 0, "more"), (40, 0, "more")]

    x = torch.randn(8, 3)
    features = FeatureSet(x, torch.arange(8) % 4, 4, torch.randn(8, 4))
    stream = ClassIncremental(features, ClassSchedule(4, 2, 2, order=[2, 3, 1, 0]), test=features)
    part = stream[1].train
    assert isinstance(part, FeatureSet)
    assert (part.num_classes, part.logits) == (4, None)
    assert torch.equal(part.features, x[[0, 1, 4, 5]])
    assert part.labels.tolist() == [3, 2, 3, 2]
    merged = stream[0].train.stats + part.stats
    assert torch.equal(merged.counts, torch.full((4,), 2))
    torch.testing.assert_close(merged.means[0], x[[2, 6]].double().mean(0), rtol=1e-6, atol=1e-6)


def test_labels_alone():
    stream = ClassIncremental(torch.tensor([0, 1, 2, -1, 2]), ClassSchedule(3, 2, 1, seed=None))
    assert [s.train_indices.tolist() for s in stream] == [[0, 1], [2, 4]]  # -1 is left out
    assert stream[1].test_indices.shape == (0,)
    with pytest.raises(InputError, match="labels alone"):
        stream[0].train  # noqa: B018
    with pytest.raises(InputError, match="no test samples"):
        stream[0].test_seen  # noqa: B018


def test_test_sizes_of_few_shot_cifar():
    """Golden check 7: tests of 6000, 6500, …, 10 000 images."""
    train, test = torch.arange(100).repeat(6), torch.arange(100).repeat(100)
    stream = ClassIncremental(train, ClassSchedule(100, 60, 5, seed=None), test=test, shots=5)
    assert [len(s.test_indices) for s in stream] == list(range(6000, 10001, 500))
    assert [len(s.train_indices) for s in stream] == [360] + [25] * 8


# --- few-shot -----------------------------------------------------------------------------------


def test_shots_by_seed():
    labels = torch.randint(10, (2000,), generator=torch.Generator().manual_seed(0))
    schedule = ClassSchedule(10, 6, 2)

    def drawn(shots, seed, schedule=schedule):
        stream = ClassIncremental(labels, schedule, shots=shots, seed=seed)
        return torch.cat([s.train_indices for s in stream][1:]).tolist()

    five = drawn(5, 0)
    assert len(set(five)) == 20
    base = ClassIncremental(labels, schedule, shots=5)[0]
    assert len(base.train_indices) == sum(int((labels == c).sum()) for c in schedule.sessions[0])
    counts = torch.bincount(schedule.remap(labels[five]), minlength=10)
    assert counts.tolist() == [0] * 6 + [5] * 4
    assert drawn(5, 0) == five
    assert drawn(5, 1) != five
    assert set(drawn(3, 0)) < set(five)  # nested
    # The draw belongs to the class, not to the time when it comes.
    other = ClassSchedule(10, 6, 2, order=[*schedule.order[:6], *schedule.order[:5:-1]])
    assert sorted(drawn(5, 0, other)) == sorted(five)


def cifar_like():
    labels = torch.arange(50_000) % 60
    labels[torch.tensor(TOPIC)] = 60 + torch.arange(25) // 5
    return labels


def test_index_lists_of_topic(tmp_path):
    schedule = ClassSchedule(65, 60, 5, seed=None)
    (tmp_path / "session_2.txt").write_text("\n".join(map(str, TOPIC)) + "\n")
    for listed in (tmp_path, [tmp_path / "session_2.txt"], [TOPIC], [np.array(TOPIC)]):
        stream = ClassIncremental(cifar_like(), schedule, shot_indices=listed)
        assert stream[1].train_indices.tolist() == TOPIC
        assert torch.bincount(stream[1].train_labels)[60:].tolist() == [5] * 5
        assert len(stream[0].train_indices) == 50_000 - 25
    base = torch.arange(60)
    stream = ClassIncremental(cifar_like(), schedule, shot_indices=[base, torch.tensor(TOPIC)])
    assert torch.equal(stream[0].train_indices, base)


def test_index_lists_of_paths(tmp_path):
    """As in TOPIC's lists of CUB-200."""
    lines = [
        "CUB_200_2011/images/101.White_Pelican/White_Pelican_0081_96148.jpg",
        "CUB_200_2011/images/101.White_Pelican/White_Pelican_0075_96422.jpg",
    ]
    dataset = Plain([0, 1, 1])
    dataset.samples = [
        ("/data/001.Albatross/a.jpg", 0),
        ("/data/101.White_Pelican/White_Pelican_0075_96422.jpg", 1),
        ("/data/101.White_Pelican/White_Pelican_0081_96148.jpg", 1),
    ]
    file = tmp_path / "session_2.txt"
    file.write_text("\n".join(lines))
    assert data.read_index_list(file, dataset).tolist() == [2, 1]
    with pytest.raises(InputError, match=r"no \.samples"):
        data.read_index_list(file)
    dataset.samples = dataset.samples[:2]
    with pytest.raises(InputError, match=r"1 images are not in the dataset.*0081"):
        data.read_index_list(file, dataset)
    with pytest.raises(InputError, match="Cannot read"):
        data.read_index_list(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("lists", "match"),
    [
        ([[0], [1], [2]], "for each of the 1 sessions"),
        ([], "for each of the 1 sessions"),
        ([[4, 99]], "0 … 5"),
        ([[-1]], "0 … 5"),
        ([[4, 4]], "listed twice"),
        ([[4, 0]], r"others, by arrival \[0\]"),
        ([[]], "Session 1 has no training samples"),
        ("elsewhere", "no folder"),
    ],
)
def test_index_lists_that_do_not_fit(lists, match):
    schedule = ClassSchedule(3, 2, 1, seed=None)
    with pytest.raises(InputError, match=match):
        ClassIncremental(torch.tensor([0, 1, 0, 1, 2, 2]), schedule, shot_indices=lists)


# --- long-tailed --------------------------------------------------------------------------------


def balanced(K=100, n=500):
    return torch.arange(K).repeat(n)


def test_ordered_tail():
    """Golden check 11: 500 … 5, by arrival."""
    schedule = ClassSchedule(100, 50, 10)
    stream = ClassIncremental(balanced(), schedule, imbalance=100)
    by_arrival = torch.bincount(torch.cat([s.train_labels for s in stream])).tolist()
    assert by_arrival == [int(500 * 0.01 ** (c / 99) + 1e-9) for c in range(100)]
    assert (by_arrival[0], by_arrival[49], by_arrival[50], by_arrival[99]) == (500, 51, 48, 5)
    assert sum(by_arrival) == 10847
    assert len(stream[0].train_indices) == 9901


def test_shuffled_tail():
    stream = ClassIncremental(
        balanced(), ClassSchedule(100, 50, 10), imbalance=100, tail="shuffled"
    )
    sizes = data.long_tail_counts(500, 100, 100)
    by_arrival = torch.bincount(torch.cat([s.train_labels for s in stream])).tolist()
    assert by_arrival[:10] == [sizes[r] for r in ORDER_2023[0]]
    assert by_arrival[-10:] == [sizes[r] for r in ORDER_2023[1]]
    assert sum(by_arrival) == 10847
    schedule = ClassSchedule(3, 1, 1)
    given = ClassIncremental(balanced(3, 8), schedule, imbalance=4, n_max=6, tail=[2, 0, 1])
    assert [len(s.train_indices) for s in given] == [1, 6, 3]
    with pytest.raises(InputError, match="each rank"):
        ClassIncremental(balanced(3, 8), schedule, imbalance=4, tail=[0, 0, 1])
    with pytest.raises(InputError, match="Did you mean 'shuffled'"):
        ClassIncremental(balanced(3, 8), schedule, imbalance=4, tail="shuffle")


def test_counts_for_mixed_streams():
    """NCT's general stream: each session plain, long-tailed or few-shot."""
    stream = ClassIncremental(balanced(4, 9), ClassSchedule(4, 2, 1), counts=[None, 3, 5, 1])
    assert torch.bincount(torch.cat([s.train_labels for s in stream])).tolist() == [9, 3, 5, 1]


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "options", "match"),
    [
        ([0, 1, 2, 3], {}, r"disagree.*no session for the classes \[3\]"),
        ([0, 1], {}, r"Session 1 has no training data.*\(2,\)"),
        ([0, 0, 2], {}, r"disagree.*classes \[1\]"),
        ([], {}, "Session 0 has no training data"),
        ([0, 1, 2, 2], {"test": [0, 1, 2, 3]}, "Schedule and test data disagree"),
        ([0, 1, 2, 2], {"test": [0, 1]}, "Session 1 has no test data"),
        ([0, 1, 2, 2], {"shots": 3}, r"3 training samples wanted of class 2 .*has 2\. Ask for 1"),
        ([0, 1, 2, 2], {"shots": 0}, "shots"),
        ([0, 1, 2, 2], {"shots": 1, "imbalance": 2}, "shots, imbalance"),
        ([0, 1, 2, 2], {"n_max": 2}, "without imbalance"),
        ([0, 1, 2, 2], {"imbalance": 5}, "without images"),
        ([0, 1, 2, 2], {"imbalance": 1, "n_max": 2}, "class 0 .*has 1"),
        ([0, 1, 2, 2], {"counts": [1, 1]}, "K = 3, got 2"),
        ([0, 1, 2, 2], {"counts": [1, 1, 0]}, "0 training samples wanted"),
        ([0, 1, 2, 2], {"shots": 1, "seed": -1}, "seed"),
    ],
)
def test_streams_that_cannot_be(labels, options, match):
    labels = torch.tensor(labels, dtype=torch.int64)
    with pytest.raises(InputError, match=match):
        ClassIncremental(labels, ClassSchedule(3, 2, 1, seed=None), **options)


def test_a_rare_class_may_lack_test_images():
    schedule = ClassSchedule(4, 2, 2, seed=None)
    stream = ClassIncremental([0, 1, 2, 3], schedule, test=[0, 1, 2])
    assert stream[1].test_labels.tolist() == [0, 1, 2]


def test_order_does_not_change_what_arrives():
    labels = torch.randint(7, (300,), generator=torch.Generator().manual_seed(1))
    a, b = (ClassIncremental(labels, ClassSchedule(7, 3, 2, seed=s), shots=4) for s in (0, None))
    for stream in (a, b):
        for session in stream:
            assert {*labels[session.train_indices].tolist()} == {*session.new}
            assert not session.train_labels.min() < len(session.seen) - len(session.new)
