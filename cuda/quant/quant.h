// The formulas of dequantisation, shared by all devices; rounded in these steps, as by bitsandbytes.
//
// NF4   levels[nibble] · (absmax_levels[absmax of the block] · absmax of its group + offset)
// int8  (q · absmax of the row) · (1/127)
//
// The including file defines WKV_FN and multiply(x, y), a product that is never fused into an FMA.

WKV_FN float quant_nf4_scale(const QuantNF4& q, long long block) {
  return multiply(q.absmax_levels[q.absmax[block]], q.group_absmax[block / QUANT_GROUP]) + q.offset[0];
}
WKV_FN float quant_int8(signed char q, float absmax) { return multiply(multiply((float)q, absmax), 7.874015718698502e-3f); }
