/* Names of the functions that may stay functions of their own, in the symbols of the built module. They carry their
 * instruction set, and those of the products what they multiply and the tile of one step, lanes by nonzeros: five
 * objects have the same functions, and a profiler shows nothing but the name of each. Inline functions need no entry:
 * what portable C leaves of them exists in scalar's object alone. A test finds out who is missing. */
#define QSP_PASTE_(a, b) a##b
#define QSP_PASTE(a, b) QSP_PASTE_(a, b)
#define QSP_NAMED(name) QSP_PASTE(name, QSP_PASTE(__, ISA_NAME))
#define QSP_TILED(name, tile) QSP_NAMED(QSP_PASTE(name, QSP_PASTE(_, tile)))

/* primitives */
#define i32x16_random_strided QSP_NAMED(i32x16_random_strided)

/* neon.h */
#define f32x16_load_part QSP_NAMED(f32x16_load_part)
#define f32x16_store_part QSP_NAMED(f32x16_store_part)

/* what the table has */
#define spmm_u8_kernel QSP_TILED(spmm_u8s8, ISA_SPMM_TILE)
#define spmm_f32_kernel QSP_NAMED(spmm_f32_64x2)
#define sddmm_u8_kernel QSP_TILED(sddmm_u8s8, ISA_SDDMM_TILE)
#define sddmm_f32_kernel QSP_NAMED(sddmm_f32_64x1)
#define spmm_dense_kernel QSP_NAMED(spmm_dense_u8s8)
#define sddmm_dense_kernel QSP_NAMED(sddmm_dense_u8s8)
#define sddmm_dense_units_kernel QSP_NAMED(sddmm_dense_units)
#define dense_rows_kernel QSP_NAMED(dense_rows)
#define dense_column_max_kernel QSP_NAMED(dense_column_max)
#define dense_scales_kernel QSP_NAMED(dense_scales)
#define dense_columns_kernel QSP_NAMED(dense_columns)
#define dense_totals_kernel QSP_NAMED(dense_totals)
#define offsets_kernel QSP_NAMED(offsets)
#define pair_kernel QSP_NAMED(pair)
#define pack_u8_kernel QSP_NAMED(pack_u8)
#define pack_f32_kernel QSP_NAMED(pack_f32)
#define range_kernel QSP_NAMED(range)
#define range_channels_kernel QSP_NAMED(range_channels)
#define moments_kernel QSP_NAMED(moments)
#define quantize_rows_kernel QSP_NAMED(quantize_rows)
#define norm_moments_kernel QSP_NAMED(norm_moments)
#define epilogue_kernel QSP_NAMED(epilogue)
#define epilogue_range_kernel QSP_NAMED(epilogue_range)
#define epilogue_sums_kernel QSP_NAMED(epilogue_sums)
#define epilogue_grad_kernel QSP_NAMED(epilogue_grad)
#define extent_kernel QSP_NAMED(extent)
#define quantize_kernel QSP_NAMED(quantize)
#define dequantize_kernel QSP_NAMED(dequantize)
#define relu_kernel QSP_NAMED(relu)
#define keep_kernel QSP_NAMED(keep)
#define digest_kernel QSP_NAMED(digest)
#define tokens_product_kernel QSP_NAMED(tokens_product)
#define tokens_quantize_kernel QSP_NAMED(tokens_quantize)
#define tokens_gather_kernel QSP_NAMED(tokens_gather)
#define coded_copy_kernel QSP_NAMED(coded_copy)
#define coded_flatten_kernel QSP_NAMED(coded_flatten)
#define coded_pool_kernel QSP_NAMED(coded_pool)
#define coded_add_kernel QSP_NAMED(coded_add)
#define coded_table_kernel QSP_NAMED(coded_table)
#define coded_unpack_kernel QSP_NAMED(coded_unpack)

/* amx_tiles.h */
#define tile_model_release QSP_NAMED(tile_model_release)
#define tile_model_config QSP_NAMED(tile_model_config)
#define tile_model_zero QSP_NAMED(tile_model_zero)
#define tile_model_load QSP_NAMED(tile_model_load)
#define tile_model_store QSP_NAMED(tile_model_store)
#define tile_model_dot QSP_NAMED(tile_model_dot)

/* unpack.h */
#define locate_unit QSP_NAMED(locate_unit)
#define target_init QSP_NAMED(target_init)
#define unpack_rest QSP_NAMED(unpack_rest)
#define unpack_columns QSP_NAMED(unpack_columns)
#define unpack_rows QSP_NAMED(unpack_rows)

/* requantize.h */
#define locate_coded QSP_NAMED(locate_coded)
#define requantize_rows QSP_NAMED(requantize_rows)
#define locate_task QSP_NAMED(locate_task)

/* coded.h */
#define coded_ends QSP_NAMED(coded_ends)

/* coded_steps.h */
#define pool_max_part QSP_NAMED(pool_max_part)
#define pool_max_image QSP_NAMED(pool_max_image)
#define pool_mean_part QSP_NAMED(pool_mean_part)

/* spmm.h */
#define spmm_long_row QSP_NAMED(spmm_long_row)

/* epilogue.h */
#define epilogue_any QSP_NAMED(epilogue_any)
#define epilogue_row_any QSP_NAMED(epilogue_row_any)
#define row_maker_of QSP_NAMED(row_maker_of)
#define make_row QSP_NAMED(make_row)
#define epilogue_slope_any QSP_NAMED(epilogue_slope_any)
#define epilogue_grad_any QSP_NAMED(epilogue_grad_any)
#define epilogue_row_f32_leaky QSP_NAMED(epilogue_row_f32_leaky)
#define epilogue_row_f32_silu QSP_NAMED(epilogue_row_f32_silu)
#define epilogue_row_f32_hardswish QSP_NAMED(epilogue_row_f32_hardswish)
#define epilogue_row_f32_gelu QSP_NAMED(epilogue_row_f32_gelu)
#define epilogue_row_f32_gelu_tanh QSP_NAMED(epilogue_row_f32_gelu_tanh)
#define epilogue_row_bf16_leaky QSP_NAMED(epilogue_row_bf16_leaky)
#define epilogue_row_bf16_silu QSP_NAMED(epilogue_row_bf16_silu)
#define epilogue_row_bf16_hardswish QSP_NAMED(epilogue_row_bf16_hardswish)
#define epilogue_row_bf16_gelu QSP_NAMED(epilogue_row_bf16_gelu)
#define epilogue_row_bf16_gelu_tanh QSP_NAMED(epilogue_row_bf16_gelu_tanh)

/* pack_plain.h */
#define pack_lines_any QSP_NAMED(pack_lines_any)
#define pack_lines_f32_nearest QSP_NAMED(pack_lines_f32_nearest)
#define pack_lines_f32_random QSP_NAMED(pack_lines_f32_random)
#define pack_lines_bf16_nearest QSP_NAMED(pack_lines_bf16_nearest)
#define pack_lines_bf16_random QSP_NAMED(pack_lines_bf16_random)
#define pack_lines_f32_floats QSP_NAMED(pack_lines_f32_floats)
#define pack_lines_bf16_floats QSP_NAMED(pack_lines_bf16_floats)
#define pack_tiles_f32_floats QSP_NAMED(pack_tiles_f32_floats)
#define pack_tiles_bf16_floats QSP_NAMED(pack_tiles_bf16_floats)

/* pack_bands.h */
#define band_write QSP_NAMED(band_write)
#define band_gap QSP_NAMED(band_gap)
#define band_init QSP_NAMED(band_init)
#define band_has_fours QSP_NAMED(band_has_fours)
#define pack_band_any QSP_NAMED(pack_band_any)
#define pack_bands_any QSP_NAMED(pack_bands_any)
#define pack_f32_nearest QSP_NAMED(pack_f32_nearest)
#define pack_f32_random QSP_NAMED(pack_f32_random)
#define pack_bf16_nearest QSP_NAMED(pack_bf16_nearest)
#define pack_bf16_random QSP_NAMED(pack_bf16_random)
#define pack_normed_u8 QSP_NAMED(pack_normed_u8)
#define pack_normed_f32 QSP_NAMED(pack_normed_f32)
#define pack_normed_bf16 QSP_NAMED(pack_normed_bf16)
#define pack_clamped_f32 QSP_NAMED(pack_clamped_f32)
#define pack_clamped_bf16 QSP_NAMED(pack_clamped_bf16)
#define pack_made_any QSP_NAMED(pack_made_any)
#define pack_norm_grad_f32 QSP_NAMED(pack_norm_grad_f32)
#define pack_norm_grad_bf16 QSP_NAMED(pack_norm_grad_bf16)
#define pack_bare_grad_f32 QSP_NAMED(pack_bare_grad_f32)
#define pack_bare_grad_bf16 QSP_NAMED(pack_bare_grad_bf16)
#define pack_grad_random QSP_NAMED(pack_grad_random)
#define pack_grad_nearest QSP_NAMED(pack_grad_nearest)

/* pack.h */
#define fill_gaps QSP_NAMED(fill_gaps)
#define run_packer_of QSP_NAMED(run_packer_of)
#define band_packer_of QSP_NAMED(band_packer_of)
#define pack_task QSP_NAMED(pack_task)
