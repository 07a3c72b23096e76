#include "cpu/norm.h"

namespace lar::cpu {

void rms_norm(const lar_message&, const lar_norm&) {}  // the helper's: replaced by the merge

}  // namespace lar::cpu
