#include "gemm.cuh"

template struct pykernels::cuda::hopper::Member<pykernels::cuda::hopper::Schedule::tile_128x256>;
