"""One file per op: its launcher, its two doors, and the public function on BlockSparseTensors."""
