"""Looking into a file of ``torch.save`` before torch does: what is read is no larger than the file, and only tensors.

Such a file is an archive of values and a pickle that says which tensors they are. The archive may be packed a
thousandfold, and the pickle may ask for objects of any size: ``weights_only`` keeps it from running code, no more.
"""

import pickle
import pickletools
import re
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile

_TENSORS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (\w+Storage)|torch\.storage \w+Storage"
)
"""What the pickle of a state dict names."""


def check_checkpoint_file(file: Path) -> None:
    """Refuse a file that torch would unfold into more than it holds. Nothing in it is unpickled.

    Raises:
        pickle.UnpicklingError: If it is not an archive of ``torch.save``, or names more than tensors.
        BadZipFile: If it is truncated, packed, or its parts lie over each other.
    """
    with file.open("rb") as content:
        if content.read(4) != b"PK\x03\x04":
            raise pickle.UnpicklingError("not an archive")
    with ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != ZIP_STORED for entry in entries):
            raise BadZipFile("it is packed, which torch.save does not do")
        if sum(entry.file_size for entry in entries) > file.stat().st_size:
            raise BadZipFile("it declares more than it holds")
        for entry in entries:
            if not entry.filename.lower().endswith(".pkl"):
                continue
            try:
                operations = list(pickletools.genops(archive.read(entry)))
            except ValueError as error:
                raise pickle.UnpicklingError(str(error)) from error
            for operation, argument, _ in operations:
                is_named = operation.name in ("GLOBAL", "INST", "STACK_GLOBAL")
                if is_named and not (isinstance(argument, str) and _TENSORS.fullmatch(argument)):
                    raise pickle.UnpicklingError(f"{argument} is no tensor")
