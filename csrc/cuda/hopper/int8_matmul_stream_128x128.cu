#include "gemm.cuh"

template struct pykernels::cuda::hopper::Member<pykernels::cuda::hopper::Schedule::stream_128x128>;
