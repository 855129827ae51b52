"""Files are written whole: beside the old one, whose place they then take."""
import os

from mmengine.fileio import LocalBackend, register_backend


class WholeFileBackend(LocalBackend):
    """Local files of bytes, such as checkpoints, which are there whole or not at all.

    Text, as of metrics, is not: every rank writes it to the same file.
    """

    def put(self, obj: bytes, filepath) -> None:
        """Writes bytes beside the file and then takes the file's place.

        Raises:
            OSError: If that fails; what was there before is as it was.
        """
        filepath = os.path.realpath(filepath)  # a link stays one
        if os.path.exists(filepath) and not os.path.isfile(filepath):
            return super().put(obj, filepath)  # a pipe or a device
        part = f'{filepath}.part'
        try:
            super().put(obj, part)
            with open(part, 'rb') as file:
                os.fsync(file.fileno())
            os.replace(part, filepath)
        except OSError as error:
            if os.path.isfile(part):
                os.remove(part)
            raise OSError(
                error.errno, f'{error.strerror}, for {len(obj)} bytes; what '
                'was there before is as it was', str(filepath)) from error


def install() -> None:
    """In place of mmengine's writer of local files."""
    register_backend('local', WholeFileBackend, force=True, prefixes='')
