"""Multi-frame DICOM: the frames of an Enhanced CT or multi-frame secondary capture as slices.

Position, orientation, pixel size and rescale lie in the functional groups, once for all frames or
for each frame. Format: DICOM PS3.3 C.7.6.16 (functional groups), PS3.5 7.5 (nested data sets).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path

from medspark.data import dicom
from medspark.data.dicom import Parser, Slice, Tag
from medspark.data.headers import UnreadableVolume

SHARED, PER_FRAME = (0x5200, 0x9229), (0x5200, 0x9230)
DIRECTORY_RECORDS, REFERENCED_FILE = (0x0004, 0x1220), (0x0004, 0x1500)
_FRAME_TYPE = (0x0008, 0x9007)
_ITEM_TAG, _ITEM_END, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
# Groups with the geometry and scale of a frame, and the tag in them under which a Slice has it.
_GROUPS = {
    (0x0020, 0x9113): (dicom.POSITION,),
    (0x0020, 0x9116): (dicom.ORIENTATION,),
    (0x0028, 0x9110): (dicom.PIXEL_SPACING,),
    (0x0028, 0x9145): (dicom.INTERCEPT, dicom.SLOPE, dicom.RESCALE_TYPE),
    (0x0018, 0x9329): (_FRAME_TYPE,),
}
_SEQUENCES = {SHARED, PER_FRAME, DIRECTORY_RECORDS, *_GROUPS}
_BEFORE_PIXELS = (0x7FE0, 0x000F)  # a group length or float pixels may stand before
_LONGEST_TEXT, _DEEPEST = 4096, 8

Node = dict[Tag, "str | list[Node]"]


class _Tree(Parser):
    """Reads the wanted sequences with all that is in them; other sequences are skipped."""

    def data_set(self, end: int, last: Tag, depth: int = 0, unclosed: bool = False) -> Node:
        """Elements up to `end`, an item delimiter (needed if `unclosed`), or a tag after `last`."""
        if depth > _DEEPEST:
            raise UnreadableVolume(f"DICOM sequences nested deeper than {_DEEPEST}")
        node: Node = {}
        while self.at + 8 <= end:
            start = self.at
            tag, vr, length = self.head()
            if tag in (_ITEM_END, _SEQUENCE_END):
                return node
            if tag > last:
                self.at = start
                break
            if tag in _SEQUENCES:
                node[tag] = self._items(length, end, last, depth)
            elif length == dicom.UNDEFINED:
                self.skip_sequence(self.implicit or vr == b"UN")
            elif self.at + length > end:
                raise struct.error("a value runs past its end")
            else:
                if length <= _LONGEST_TEXT and vr != b"SQ":
                    node[tag] = self.text(tag, vr, self.data[self.at : self.at + length])
                self.at += length
        else:
            if unclosed:
                raise struct.error("an item has no end")
        return node

    def _items(self, length: int, end: int, last: Tag, depth: int) -> list[Node]:
        stop = end if length == dicom.UNDEFINED else self.at + length
        if stop > end:
            raise struct.error("a sequence runs past its end")
        items: list[Node] = []
        while self.at + 8 <= stop:
            tag, _, size = self.head()
            if tag != _ITEM_TAG:
                break
            inside = stop if size == dicom.UNDEFINED else self.at + size
            if inside > stop:
                raise struct.error("an item runs past its end")
            open_end = size == dicom.UNDEFINED
            items.append(self.data_set(inside, (0xFFFF, 0xFFFF), depth + 1, open_end))
            if not open_end:
                self.at = inside
        else:
            if length == dicom.UNDEFINED:
                raise struct.error("a sequence has no end")
        return items


def read_tree(path: Path, last: Tag) -> Node:
    """Tags up to `last`, with the functional groups or directory records as lists of items.

    Raises:
        UnreadableVolume: If the file is cut short or is no DICOM data set.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            tree = _Tree(data, 0)
            dicom.start_parser(tree)
            return tree.data_set(len(data), last)
    except (struct.error, RecursionError, ValueError) as error:
        if isinstance(error, UnreadableVolume):
            raise
        raise UnreadableVolume(f"broken DICOM header: {error}") from error


def pixel_data_place(path: Path) -> tuple[int, bool]:
    """Where the pixels are: (first byte, False), or (first byte of the element, True) if packed.

    Raises:
        UnreadableVolume: If the object has no integer pixel data.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            tree = _Tree(data, 0)
            dicom.start_parser(tree)
            tree.data_set(len(data), _BEFORE_PIXELS)
            start = tree.at
            tag, _, length = tree.head()
    except (struct.error, RecursionError) as error:
        raise UnreadableVolume(f"broken DICOM header: {error}") from error
    if tag != dicom.PIXELS:
        raise UnreadableVolume("no pixel data (7FE0,0010) in the object")
    packed = length == dicom.UNDEFINED
    return (start if packed else tree.at), packed


def frames_of(path: Path, tags: Mapping[Tag, str]) -> list[Slice]:
    """The frames of a multi-frame object, each with its own geometry and rescale tags.

    Args:
        path: The file.
        tags: Its top-level tags, which hold for all frames that do not say otherwise.

    Raises:
        UnreadableVolume: If the functional groups are broken or are not one for each frame.
    """
    tree = read_tree(path, PER_FRAME)
    common = dict(tags) | _flat(_only(tree.get(SHARED)))
    per_frame = tree.get(PER_FRAME, [])
    count = Slice(path, dict(tags), None, None).integer(dicom.FRAMES, 1)
    if isinstance(per_frame, str) or len(per_frame) not in (0, count):
        raise UnreadableVolume(
            f"NumberOfFrames is {count}, there are {len(per_frame)} per-frame functional groups"
        )
    if not per_frame:
        raise UnreadableVolume(
            f"multi-frame object of {count} frames without per-frame positions (a secondary "
            "capture, or cine): send the original slices"
        )
    return [Slice.of(path, common | _flat(group), i) for i, group in enumerate(per_frame)]


def _only(items: str | list[Node] | None) -> Node:
    return items[0] if isinstance(items, list) and items else {}


def _flat(groups: Node) -> dict[Tag, str]:
    """The values of the wanted groups under the tags of a single-frame image."""
    flat: dict[Tag, str] = {}
    for group, wanted in _GROUPS.items():
        inside = _only(groups.get(group))
        for tag in wanted:
            value = inside.get(tag)
            if isinstance(value, str) and value:
                flat[dicom.IMAGE_TYPE if tag == _FRAME_TYPE else tag] = value
    return flat
