"Write fastldm/weights/manifest.json: class, licence, size and SHA-256 of what ships, and of what is found elsewhere."
from pathlib import Path
from fastldm.core.download import manifest_entry
from fastldm.core.models import json_text, write_atomic

WEIGHTS = Path(__file__).parents[1]/'fastldm'/'weights'

def manifest():
    "What the manifest should be."
    folders = sorted(file.parent for file in WEIGHTS.glob('*/config.json'))
    return dict(models={folder.name: manifest_entry(folder) for folder in folders})

if __name__=='__main__':
    with write_atomic(WEIGHTS/'manifest.json') as path: path.write_text(json_text(manifest()), encoding='utf-8')
