#include "spectral/fingerprint.h"

#include "spectral/fingerprint.cuh"

namespace sn_fast {

void launch_fingerprint(const FingerprintParams& params, int n_units, const Stream& stream) {
    launch(fingerprint_weights, "fingerprint", static_cast<unsigned>(n_units), kFingerprintThreads,
           sizeof(FingerprintShared), stream, params);
}

}  // namespace sn_fast
