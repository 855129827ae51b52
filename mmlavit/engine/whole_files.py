"""Files are written whole: beside the old one, whose place they then take."""
import os
import socket

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend


class WholeFileBackend(LocalBackend):
    """Local files, which are there whole or not at all."""

    def put(self, obj: bytes, filepath) -> None:
        """Writes bytes beside the file and then takes the file's place.

        Several ranks may write the same file: mmengine has each write its metrics, the
        toolboxes pictures of the same name. The last one stays.

        Raises:
            OSError: If that fails; what was there before is as it was.
        """
        filepath = os.path.realpath(filepath)  # a link stays one
        if os.path.exists(filepath) and not os.path.isfile(filepath):
            return super().put(obj, filepath)  # a pipe or a device
        # The main rank's has one name, so that what a kill left is written over.
        rank = '' if is_main_process() else f'.{socket.gethostname()}.{os.getpid()}'
        part = f'{filepath}{rank}.part'
        try:
            super().put(obj, part)
            with open(part, 'rb+') as file:  # Windows syncs no file open for reading
                os.fsync(file.fileno())
            os.replace(part, filepath)
        except OSError as error:
            if os.path.isfile(part):
                os.remove(part)
            raise OSError(
                error.errno, f'{error.strerror}, for {len(obj)} bytes; what '
                'was there before is as it was', str(filepath)) from error

    def put_text(self, obj: str, filepath, encoding: str = 'utf-8') -> None:
        """As `put`."""
        self.put(obj.encode(encoding), filepath)


def install() -> None:
    """In place of mmengine's writer of local files."""
    register_backend('local', WholeFileBackend, force=True, prefixes='')
