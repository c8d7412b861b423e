"""Programs that test_ray_pool.py runs beside a cluster. Ray pickles the functions of a main program
by value, so that the cluster's workers need not find this file.
"""

import json
import os
import sys
import time
from pathlib import Path

from rwkv.config import ConvertConfig
from rwkv.data.convert import pipeline, ray_pool, source_file
from rwkv.data.convert.inputs import Chunk
from rwkv.errors import UserError


class Held:
    """The encoder, which waits for the file `release` in a folder. Before, it creates a file with
    the name of its process id there.
    """

    def __init__(self, encoder, folder):
        self._encoder, self._folder = encoder, folder

    def __call__(self, chunk):
        Path(self._folder, f"{os.getpid()}.held").touch()
        while not Path(self._folder, "release").exists():
            time.sleep(0.05)
        return self._encoder(chunk)


def hold(flags: str, folder: str) -> None:
    """Convert in many chunks, with the encoder held."""
    source_file.CHUNK = 3000
    pool = ray_pool.RayPool
    pipeline.RayPool = lambda encoder, *rest: pool(Held(encoder, folder), *rest)
    try:
        pipeline.convert(ConvertConfig(**json.loads(flags)))
    except KeyboardInterrupt:
        sys.exit(130)


def fails(chunk):
    """Fails as an encoder may, at the row "fails"."""
    text = chunk.rows[0][1]["text"]
    if text == "fails":
        raise UserError("the encoder fails")
    return text


def errors(address: str, folder: str) -> None:
    """Print the results before each kind of error, and the error."""
    path = Path(folder, "a.txt")
    path.write_text("a file")
    source = source_file.Source(path, "txt", "", 6)

    def row(text):
        return Chunk(source, 1, rows=[(0, {"text": text})])

    def feed():
        yield row("one")
        raise UserError("the input ends here")

    missing = source_file.Source(Path(folder, "missing.txt"), "txt", "", 6)
    found = {}
    with ray_pool.RayPool(fails, address, ["text"]) as pool:
        for name, chunks in {
            "worker": [row("one"), row("fails"), row("three")],
            "feed": feed(),
            "file": [Chunk(source, 6, files=[source]), Chunk(missing, 6, files=[missing]), row("three")],
        }.items():
            results = []
            try:
                for _, result in pool.map(chunks):
                    results.append(result)
            except (UserError, OSError) as error:
                found[name] = [results, str(error)]
        ours = ray_pool._versions()
        ray_pool._versions = lambda: ours | {"orjson": "0.1"}
        try:
            list(pool.map([row("one")]))
        except UserError as error:
            found["version"] = [[], str(error)]
    print(json.dumps(found))


if __name__ == "__main__":
    {"hold": hold, "errors": errors}[sys.argv[1]](*sys.argv[2:])
