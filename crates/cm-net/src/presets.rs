//! The networks of published models. Each number is from the paper named beside it; counts of parameters are
//! checked against the published files.

use crate::spec::{
    AttnHeads, Decoder, DhariwalUnetSpec, Encoder, NoiseEmbedding, OpenaiUnetSpec, SongUnetSpec,
};

impl SongUnetSpec {
    /// EDM's DDPM++ for CIFAR-10 (Karras et al. 2022, table 7): 55,733,891 parameters, or 55,735,299 with
    /// `num_classes = 10`.
    #[must_use]
    pub fn ddpmpp_cifar10(num_classes: i64) -> Self {
        Self {
            image_size: 32,
            image_channels: 3,
            num_classes,
            augment_dim: 9,
            model_channels: 128,
            channel_mult: vec![2, 2, 2],
            channel_mult_emb: 4,
            num_blocks: 4,
            attn_resolutions: vec![16],
            dropout: 0.13,
            label_dropout: 0.0,
            embedding: NoiseEmbedding::Positional {},
            channel_mult_noise: 1,
            encoder: Encoder::Standard,
            decoder: Decoder::Standard,
            resample_filter: vec![1.0, 1.0],
        }
    }

    /// EDM's NCSN++ for CIFAR-10 (Karras et al. 2022, table 7): 56,397,827 parameters without classes.
    #[must_use]
    pub fn ncsnpp_cifar10(num_classes: i64) -> Self {
        Self {
            embedding: NoiseEmbedding::Fourier { scale: 16.0 },
            channel_mult_noise: 2,
            encoder: Encoder::Residual,
            resample_filter: vec![1.0, 3.0, 3.0, 1.0],
            ..Self::ddpmpp_cifar10(num_classes)
        }
    }

    /// The NCSN++ of the CIFAR-10 consistency models (Song et al. 2023, appendix C), which knows no augmentation
    /// and has no dropout: 56,395,523 parameters.
    #[must_use]
    pub fn consistency_cifar10() -> Self {
        Self { augment_dim: 0, dropout: 0.0, ..Self::ncsnpp_cifar10(0) }
    }

    /// EDM's DDPM++ for FFHQ and AFHQv2 at 64×64 (Karras et al. 2022, table 7; dropout 0.05 and 0.25):
    /// 61,805,571 parameters.
    #[must_use]
    pub fn ddpmpp_64(dropout: f64) -> Self {
        Self { image_size: 64, channel_mult: vec![1, 2, 2, 2], dropout, ..Self::ddpmpp_cifar10(0) }
    }
}

impl DhariwalUnetSpec {
    /// EDM's ADM for ImageNet-64 (Karras et al. 2022, table 7): 295,899,267 parameters.
    #[must_use]
    pub fn adm_imagenet64() -> Self {
        Self {
            image_size: 64,
            image_channels: 3,
            num_classes: 1000,
            augment_dim: 0,
            model_channels: 192,
            channel_mult: vec![1, 2, 3, 4],
            channel_mult_emb: 4,
            num_blocks: 3,
            attn_resolutions: vec![32, 16, 8],
            dropout: 0.1,
            label_dropout: 0.0,
        }
    }
}

impl OpenaiUnetSpec {
    /// The network of the ImageNet-64 consistency models (Song et al. 2023, appendix C): 295,899,267 parameters.
    #[must_use]
    pub fn imagenet64() -> Self {
        Self {
            image_size: 64,
            image_channels: 3,
            num_classes: 1000,
            model_channels: 192,
            channel_mult: vec![1, 2, 3, 4],
            num_blocks: 3,
            attn_resolutions: vec![32, 16, 8],
            attn_heads: AttnHeads::HeadChannels(64),
            dropout: 0.0,
            scale_shift_norm: true,
            resblock_updown: true,
        }
    }

    /// The network of the LSUN bedroom and cat consistency models at 256×256 (Song et al. 2023, appendix C):
    /// 526,304,771 parameters.
    #[must_use]
    pub fn lsun256() -> Self {
        Self {
            image_size: 256,
            num_classes: 0,
            model_channels: 256,
            channel_mult: vec![1, 1, 2, 2, 4, 4],
            num_blocks: 2,
            scale_shift_norm: false,
            ..Self::imagenet64()
        }
    }
}
