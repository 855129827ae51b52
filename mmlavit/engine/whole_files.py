"""Files are written whole: beside the old one, whose place they then take."""
import os
import socket

from mmengine.fileio import LocalBackend, register_backend


class WholeFileBackend(LocalBackend):
    """Local files, which are there whole or not at all."""

    def put(self, obj: bytes, filepath) -> None:
        """Writes bytes beside the file and then takes the file's place.

        Raises:
            OSError: If that fails; what was there before is as it was.
        """
        self._put(obj, filepath, '.part')

    def put_text(self, obj: str, filepath, encoding: str = 'utf-8') -> None:
        """As `put`.

        mmengine has every rank write its metrics to the same file. They differ in
        length, so that one over the other would be no JSON.
        """
        self._put(obj.encode(encoding), filepath,
                  f'.{socket.gethostname()}.{os.getpid()}.part')

    def _put(self, obj: bytes, filepath, suffix: str) -> None:
        filepath = os.path.realpath(filepath)  # a link stays one
        if os.path.exists(filepath) and not os.path.isfile(filepath):
            return super().put(obj, filepath)  # a pipe or a device
        part = f'{filepath}{suffix}'
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


def install() -> None:
    """In place of mmengine's writer of local files."""
    register_backend('local', WholeFileBackend, force=True, prefixes='')
